"""An optimizer's step as a CUDA graph, which the host launches in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.schedule import until_refresh


class ReplayedStep:
    """``optimizer.step()`` that captures itself in a CUDA graph and from then on replays it between refreshes.

    A graph holds addresses. A step is captured once its gradients lie where those of the step before lay, as they do
    with ``optimizer.zero_grad(set_to_none=False)``; a step whose gradients have moved, whose options (but ``lr``) have
    changed, or that refreshes a basis runs as usual. What a step allocates stays reserved for the graph. It makes the
    same updates; not measured on a GPU so far. ::

        optimizer = GaLoreAdamW(params, lr=1e-3, capturable=True)
        step = ReplayedStep(optimizer)
        for batch in batches:
            loss(batch).backward()
            step()
            optimizer.zero_grad(set_to_none=False)

    Args:
        optimizer: with ``capturable=True`` in every group, its parameters on one CUDA device.

    Raises:
        ValueError: a group without ``capturable``, here or in a step.
    """

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.optimizer = optimizer
        self._check()
        # Steps until one refreshes.
        self._left = 0
        self._seen: tuple[Any, ...] | None = None
        self._captured: tuple[Any, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        # Schedulers write numbers, of which a graph would hold the first.
        self._rates: list[Tensor | None] = []
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget())

    def forget(self) -> None:
        """Drop the graph, and the memory that is reserved for it; call it after state was replaced by hand."""
        self._left, self._seen, self._captured, self._graph = 0, None, None, None

    def _check(self) -> None:
        for group in self.optimizer.param_groups:
            if not group["capturable"]:
                raise ValueError(f"Invalid capturable: {group['capturable']}, expected True in every group to replay")

    @torch.no_grad()
    def __call__(self) -> None:
        """Make the step."""
        seen = self._addresses()
        if self._left < 1 or seen != self._seen:
            self.optimizer.step()
            self._left, self._seen = self._until_refresh(), seen
            return
        if seen != self._captured:
            self._capture()
            self._captured = seen
        assert self._graph is not None
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            if rate is not None:
                rate.fill_(group["lr"])
        self._graph.replay()
        self._left -= 1

    def _addresses(self) -> tuple[Any, ...]:
        """What a graph holds, and would not notice a change of."""
        found: list[Any] = []
        for group in self.optimizer.param_groups:
            lr = id(group["lr"]) if isinstance(group["lr"], Tensor) else None
            found.append((self.optimizer._key(group), group["weight_decay"], lr))
            for p in group["params"]:
                found.append((p.data_ptr(), None if p.grad is None else p.grad.data_ptr()))
        return tuple(found)

    def _until_refresh(self) -> int:
        """Steps that come before the next refresh of any parameter; reads all counters from the device at once."""
        # A state that was loaded brings its options.
        self._check()
        rows = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    plan = self.optimizer.plan_of(p, group)
                    if plan.parts.subspace is not None:
                        rows.append((plan, group))
        if not rows:
            return 2**62
        steps = torch.stack([plan.state["step"] for plan, _ in rows]).tolist()
        return min(
            0 if plan.state["waiting"] else until_refresh(int(step), plan.state, group, plan.place)
            for step, (plan, group) in zip(steps, rows, strict=True)
        )

    def _capture(self) -> None:
        """Record the step without making it."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        device = groups[0]["params"][0].device
        self._rates = [torch.tensor(lr, device=device) if isinstance(lr, (int, float)) else None for lr in rates]
        graph = torch.cuda.CUDAGraph()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                if rate is not None:
                    group["lr"] = rate
            with torch.cuda.graph(graph):
                self.optimizer.step()
        finally:
            for group, lr in zip(groups, rates, strict=True):
                group["lr"] = lr
        self._graph = graph
