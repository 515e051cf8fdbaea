"""Less traffic between data-parallel processes: gradients are reduced in the subspace that the optimizer keeps."""

# No deferred annotations: DistributedDataParallel compares those of a hook with its own types.

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.plans import Plan
from lowrank_optim.optim.schedule import refresh_due
from lowrank_optim.optim.views import as_matrices


class LowRankAllReduce:
    """A communication hook of DistributedDataParallel that sends R = G P (rows, rank) in place of G (rows, d)::

        model = DistributedDataParallel(model)
        optimizer = GaLoreAdamW(low_rank_groups(model.module, rank=128))
        traffic = LowRankAllReduce(model, optimizer)

    Afterwards ``p.grad`` holds the mean of R over the processes times Pᵀ. With an orthonormal P its projection is R
    again, so that the optimizer does what it does on whole gradients. Gradients go whole

    - at the first update and at every update that refreshes a basis;
    - for parameters that are not compressed, and where an update reads more of the gradient than its projection (Fira,
      APOLLO, FRUGAL, Trion, LDAdam, error feedback);
    - where P is not orthonormal (a Gaussian sketch, a 4-bit basis).

    The norm of gradients, and so clipping, then sees R in place of G, whose norm is at most as large. In bfloat16 P is
    orthonormal to 2e-3, by which the projection of R Pᵀ differs from R.

    The idea of reducing a low-rank factor is that of PowerSGD (Vogels et al. 2019, arXiv 1905.13727); here the factor
    is the one that the optimizer uses, so nothing is lost.

    Args:
        model: the wrapper; it takes one communication hook.
        optimizer: over parameters of the same model, with the same groups on all processes.

    Attributes:
        sent: bytes that this process has given to all-reduce.
        whole: bytes of the gradients that they stood for.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: LowRankOptimizer) -> None:
        self.optimizer, self.group = optimizer, model.process_group
        self.sent = self.whole = 0
        if all(reason_to_send_whole(optimizer, p) for group in optimizer.param_groups for p in group["params"]):
            warnings.warn(
                f"{type(optimizer).__name__}: no parameter can be summed at low rank, all gradients are sent whole; "
                "LowRankAllReduce.explain() says why",
                stacklevel=2,
            )
        model.register_comm_hook(None, self._reduce)

    def explain(self) -> list[tuple[str, str]]:
        """For every parameter its name, and "low rank" or why its gradient is sent whole."""
        rows = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                entry = self.optimizer.entry(p)
                reason = reason_to_send_whole(self.optimizer, p) or "low rank"
                rows.append((entry.name or f"param.{entry.place}", reason))
        return rows

    def _plan(self, param: Tensor) -> Plan | None:
        """The plan of a parameter whose coming update can do with its low-rank gradient."""
        group = self.optimizer.entry(param).group
        if reason_to_send_whole(self.optimizer, param) is not None:
            return None
        plan = self.optimizer.plan_of(param, group)
        return None if refresh_due(plan.state, group, plan.place) else plan

    @torch.no_grad()
    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        gradients = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        plans = [self._plan(param) for param, _ in gradients]
        parts = []
        for (param, grad), plan in zip(gradients, plans):
            if plan is None:
                parts.append(grad.reshape(-1))
                continue
            assert plan.parts.subspace is not None
            oriented = plan.parts.subspace.orient(as_matrices(grad, plan.view), plan.state)
            low = plan.parts.subspace.project(oriented, plan.state, self.optimizer.entry(param).group)
            parts.append(low.to(grad.dtype).reshape(-1))
        flat = torch.cat(parts).div_(dist.get_world_size(self.group))
        self.sent += flat.nbytes
        self.whole += bucket.buffer().nbytes

        def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            pieces = torch.split(future.value()[0], [len(part) for part in parts])
            with torch.no_grad():
                for (param, grad), plan, piece in zip(gradients, plans, pieces):
                    if plan is None:
                        grad.copy_(piece.view_as(grad))
                    else:
                        self._expand_(grad, plan, piece, self.optimizer.entry(param).group)
            return bucket.buffer()

        sent = dist.all_reduce(flat, group=self.group, async_op=True)
        assert sent is not None
        return sent.get_future().then(put_back)

    def _expand_(self, grad: Tensor, plan: Plan, piece: Tensor, group: dict[str, Any]) -> None:
        """grad = R Pᵀ."""
        subspace = plan.parts.subspace
        assert subspace is not None
        oriented = subspace.orient(as_matrices(grad.zero_(), plan.view), plan.state)
        low = piece.view(subspace.low_shape(plan.view, group))
        subspace.project_back_(oriented, low, plan.state, group, alpha=1.0)


def reason_to_send_whole(optimizer: LowRankOptimizer, param: Tensor) -> str | None:
    """Why the gradient of a parameter is always sent whole by :class:`LowRankAllReduce`, None where it is not."""
    group = optimizer.entry(param).group
    subspace, _, lift = optimizer.parts_of(param, group)
    if subspace is None:
        return "it is not compressed"
    if lift.reads_gradient(group):
        return "its update reads the whole gradient"
    return None if subspace.orthonormal else "its basis is not orthonormal"
