"""Updates inside the backward pass: a gradient lives until it is used, and micro-batches are summed at low rank."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.optim.accumulation import SUM_DTYPES, Accumulator
from lowrank_optim.optim.engine import LowRankOptimizer, without_autocast
from lowrank_optim.optim.parts import Group
from lowrank_optim.optim.validation import check_choice, check_positive_int, check_range
from lowrank_optim.optim.views import is_sharded

CLIPS = ("previous", "layer")

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def step_in_backward(
    optimizer: LowRankOptimizer,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    clip_by: str = "previous",
    two_phase: bool | None = None,
    sum_dtype: torch.dtype = torch.float32,
    process_group: dist.ProcessGroup | None = None,
) -> StepInBackward:
    """Update every parameter in the backward pass, as soon as its gradient is there, and free the gradient at once.

    A hook on each parameter calls ``optimizer.step_param``, so that state, schedule and checkpoint are those of the
    ordinary loop, and so is the result, bit for bit, with ``accumulate=1`` and without clipping::

        handle = step_in_backward(optimizer, accumulate=4)
        for batches in loader:                          # four micro-batches
            for batch in batches:
                with handle.micro_batch():              # with accumulate=1 a bare backward() will do
                    (model(**batch).loss / 4).backward()
            scheduler.step()                            # once per update; optimizer.step() finds nothing to do
            log(handle.grad_norm)

    With ``accumulate > 1`` the sum R = Σ G_i P (rows, rank) is kept instead of the gradient. A refresh is linear too:
    at the update where it is due Q = qr(R), at the next one P = qr(Σ G_iᴴ Q), which the updates after that use. With an
    unchanging gradient that is the subspace iteration of ``refresh="power"``. ``refresh="randomized"`` takes a
    Gaussian matrix in place of P. :class:`DCTAdamW` selects by Σ Z G_i with a Gaussian Z of rank rows, after the update
    where a refresh is due. Only the first basis comes from the first micro-batch alone.

    The whole gradient is summed in ``p.grad``, and freed in the last micro-batch's backward pass, for full-rank
    parameters and where an update reads it: Fira, APOLLO, FRUGAL, Trion, LDAdam, Alice, methods without a basis (Muon,
    FOAM, LoRAPre, SinkGD, SCALE, RACS), error feedback, tensors and ``proj_type="full"``, ``refresh="svd"``, DCTAdamW
    with ``update_proj_gap=1`` or ``ell_norm=1``.

    Args:
        optimizer: any of this package. Parameters that are unfrozen or added later are updated too.
        accumulate: micro-batches per update. Divide their losses by it: gradients are added. ``handle.accumulate = n``
            between two updates holds from the next one on, for instance where an epoch ends early.
        max_norm: clip gradients to this norm, or None. The norm of all gradients is not known before the last of them,
            when the first is gone, therefore:
        clip_by: "previous" scales every gradient by max_norm / max(norm of all at the update before, its own norm)
            where that is below 1 (at the first update: its own norm times the root of the number of parameters);
            "layer" by max_norm / its own norm.
        two_phase: refresh as above; None: where ``accumulate > 1``. True with 1 is what a run with
            ``accumulate > 1`` must agree with.
        sum_dtype: of R, ``torch.float32`` or ``torch.bfloat16`` (stochastically rounded).
        process_group: of data-parallel processes with the same model, which is not wrapped: gradients, or with
            ``accumulate > 1`` the sums R, become their mean over the group. All processes must meet the same parameters
            in the same order in their backward passes.

    Returns:
        A handle: ``micro_batch()``, ``grad_norm``, ``abandon()``, ``remove()``. The norm that ``clip_by="previous"``
        remembers is in the optimizer's own ``state_dict()``.

    Raises:
        TypeError: an optimizer of another package.
        ValueError: an argument out of range, or an optimizer that is attached already.
        RuntimeError: in the backward pass, when micro-batches are miscounted; from ``optimizer.step`` and
            ``optimizer.state_dict`` between the micro-batches of an update.

    Parameters of ``fully_shard`` are updated from their reduced gradients; their micro-batches are summed whole.

    Not supported: DistributedDataParallel (a hook sees the gradient of its own process; see ``process_group``), loss
    scaling, and checkpointing with ``use_reentrant=True``.
    """
    two_phase = accumulate != 1 if two_phase is None else two_phase
    return StepInBackward(optimizer, accumulate, max_norm, clip_by, two_phase, sum_dtype, process_group)


class StepInBackward:
    """What :func:`step_in_backward` returns."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        accumulate: int,
        max_norm: float | None,
        clip_by: str,
        two_phase: bool,
        sum_dtype: torch.dtype,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, LowRankOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(optimizer).__module__}.{type(optimizer).__name__} cannot update one "
                "parameter at a time, expected an optimizer of lowrank_optim (with rank=None GaLoreAdamW is AdamW)"
            )
        if optimizer in _attached:
            raise ValueError("Invalid optimizer: it already steps in the backward pass; remove() that handle first")
        check_positive_int("accumulate", accumulate)
        if max_norm is not None:
            check_range("max_norm", max_norm, low=0.0)
        if clip_by == "global":
            raise ValueError(
                "Invalid clip_by: 'global', expected 'previous' or 'layer'; the norm of all gradients is known only "
                "after the first ones are used and freed"
            )
        check_choice("clip_by", clip_by, CLIPS)
        check_choice("sum_dtype", sum_dtype, SUM_DTYPES)
        self.optimizer, self.accumulate = optimizer, accumulate
        self.max_norm, self.clip_by = max_norm, clip_by
        self.two_phase, self.sum_dtype = two_phase, sum_dtype
        self.process_group = process_group
        self._grad_norm: Tensor | None = None
        self._done = 0
        self._task: int | None = None
        self._inside = False
        self._seen: set[Tensor] = set()
        self._norms: list[Tensor] = []
        self._sums: dict[Tensor, Accumulator] = {}
        self._handles: list[Any] = []
        optimizer.defaults["two_phase"] = two_phase
        for group in optimizer.param_groups:
            self._attach(group)
        optimizer.on_new_group = self._attach
        if max_norm is not None and clip_by == "previous":
            # There from the start: a distributed checkpoint loads only what a new optimizer has.
            optimizer.param_groups[0].setdefault(
                "clip_norm", torch.tensor(torch.nan, dtype=torch.float32, device="cpu")
            )
        for register, action in (
            (optimizer.register_step_pre_hook, "step"),
            (optimizer.register_state_dict_pre_hook, "save"),
        ):
            self._handles.append(register(partial(self._check_complete, action)))
        _attached.add(optimizer)

    def _attach(self, group: Group) -> None:
        group["two_phase"] = self.two_phase
        for p in group["params"]:
            # A frozen parameter may be unfrozen later, and takes a hook only while it is not frozen.
            frozen = not p.requires_grad
            self._handles.append(p.requires_grad_().register_post_accumulate_grad_hook(self._on_gradient))
            if frozen:
                p.requires_grad_(False)

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.optimizer.param_groups)

    def remove(self) -> None:
        """Return to the ordinary loop; what an unfinished update has summed is dropped."""
        self.abandon()
        self.optimizer.on_new_group = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self.optimizer)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last update before clipping, 0-d; None before the first.

        Exact, but for matrices that are summed at low rank: there it is that of R, which is not above.
        """
        self._end_implicit()
        return self._grad_norm

    def sums(self, param: Tensor) -> Accumulator | None:
        """What micro-batches of an unfinished update have summed of one parameter at low rank."""
        return self._sums.get(param)

    def state_dict(self) -> dict[str, Tensor | None]:
        """What ``clip_by="previous"`` remembers, which the optimizer's own state dict holds as well."""
        self._end_implicit()
        return {"clip_norm": self.optimizer.param_groups[0].get("clip_norm")}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue from :meth:`state_dict`."""
        self.optimizer.param_groups[0]["clip_norm"] = state["clip_norm"]

    @contextmanager
    def micro_batch(self, last: bool | None = None) -> Iterator[None]:
        """Around the one backward pass of a micro-batch.

        An error inside abandons the update; parameters that were updated before it stay so.

        Args:
            last: whether it completes the update; checked against the handle's own count where given.

        Raises:
            RuntimeError: ``last`` disagrees with the count, or nested.
        """
        if self._inside:
            raise RuntimeError("micro_batch() inside another micro_batch()")
        self._end_implicit()
        completes = self._done + 1 == self.accumulate
        if last is not None and last != completes:
            raise RuntimeError(
                f"micro-batch {self._done + 1} of {self.accumulate} is {'' if completes else 'not '}the last one of "
                f"this update, got last={last}"
            )
        self._inside = True
        try:
            yield
            self._done += 1
            self._seen.clear()
            if completes:
                # Those that had a gradient in earlier micro-batches only.
                for p in self._params():
                    self._step(p, self.optimizer.entry(p).group)
                self._end()
        except BaseException:
            self.abandon()
            raise
        finally:
            self._inside = False

    def abandon(self) -> None:
        """Drop what an unfinished update has summed; the next micro-batch is the first of a new one."""
        if self._done or self._inside:
            for p in self._params():
                p.grad = None
        self._sums.clear()
        self._norms.clear()
        self._seen.clear()
        self._done, self._task = 0, None

    def _check_complete(self, action: str, *_: Any) -> None:
        if self._done:
            raise RuntimeError(
                f"Cannot {action} after {self._done} of {self.accumulate} micro-batches: sums of gradients are in no "
                "state; finish the update, or abandon() it"
            )

    def _mean_(self, tensor: Tensor) -> Tensor:
        """The mean over the process group, in place."""
        if self.process_group is not None:
            dist.all_reduce(tensor, group=self.process_group)
            tensor.div_(dist.get_world_size(self.process_group))
        return tensor

    def _check_processes(self, param: Tensor) -> None:
        """Raise where other processes have gradients of the same parameter that nobody would add."""
        if self.process_group is None and not is_sharded(param):
            processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            if processes > 1:
                raise RuntimeError(
                    f"step_in_backward in {processes} processes: a hook sees the gradient of its own process, so that "
                    "copies of the model would drift apart; pass process_group=torch.distributed.group.WORLD and do "
                    "not wrap the model in DistributedDataParallel, or use fully_shard"
                )

    @torch.no_grad()
    @without_autocast()
    def _on_gradient(self, param: Tensor) -> None:
        self._check_processes(param)
        if not self._inside:
            self._begin_implicit(param)
        if param in self._seen:
            raise RuntimeError(
                f"A parameter of shape {tuple(param.shape)} got two gradients within one micro-batch: make one "
                "backward pass in each micro_batch(), and checkpoint with use_reentrant=False"
            )
        self._seen.add(param)
        group = self.optimizer.entry(param).group
        if self.two_phase and self.optimizer.accumulates(param, group):
            if param not in self._sums:
                self._sums[param] = Accumulator(self.optimizer, param, group, self.sum_dtype, self._mean_)
            self._sums[param].add()
        if self._done + 1 == self.accumulate:
            self._step(param, group)

    def _begin_implicit(self, param: Tensor) -> None:
        """A backward pass without micro_batch() is an update; its number tells it from the one before."""
        if self.accumulate != 1:
            raise RuntimeError(
                f"accumulate={self.accumulate} needs every backward pass inside `with handle.micro_batch():`"
            )
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._end_implicit(param)
            self._task = task

    def _end_implicit(self, newer: Tensor | None = None) -> None:
        if self._task is not None and not self._inside:
            self._end(newer)

    def _end(self, newer: Tensor | None = None) -> None:
        """Take the norm of an update that is complete; ``newer`` holds a gradient of the next one already.

        Raises:
            RuntimeError: a parameter got a gradient and no hook saw it.
        """
        if self._norms:
            device = self._norms[0].device
            self._grad_norm = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in self._norms]))
            if self.max_norm is not None and self.clip_by == "previous":
                group, norm = self.optimizer.param_groups[0], self._grad_norm
                before = group.get("clip_norm")
                before = norm.new_tensor(torch.nan) if before is None else before.to(device)
                # Of the last update whose norm was finite.
                group["clip_norm"] = torch.where(norm.isfinite(), norm, before)
        for p in self._params():
            if p.grad is not None and p is not newer:
                raise RuntimeError(
                    f"{self.optimizer._name(p)} of shape {tuple(p.shape)} has a gradient that no hook saw: it replaced "
                    "another one in a group; remove() the handle and attach the optimizer anew"
                )
        self.abandon()

    @torch.no_grad()
    @without_autocast()
    def _step(self, param: Tensor, group: Group) -> None:
        """Make the update of one parameter and free its gradient, or its sums."""
        sums = self._sums.pop(param, None)
        if sums is not None:
            sums.step(self._clip_)
        elif param.grad is not None:
            if param.grad.layout is torch.strided:
                self._mean_(param.grad)
                self._clip_(param.grad)
            self.optimizer.step_param(param, group)
            param.grad = None

    def _clip_(self, grad: Tensor) -> None:
        """Count the norm of one gradient and clip it."""
        sums = None
        if is_sharded(grad):
            from lowrank_optim.optim.sharding import local, shards_of

            sums, grad = shards_of(grad), local(grad)
        values = torch.view_as_real(grad) if grad.is_complex() else grad
        norm = vector_norm(values)
        if sums is not None:
            norm = sums.sum_(norm.square()).sqrt()
        self._norms.append(norm)
        if self.max_norm is None:
            return
        seen = norm
        if self.clip_by == "previous":
            # At the first update it is as if all gradients were as large as this one: Adam's second moment remembers a
            # first gradient that is too large for a thousand updates.
            first = norm * sum(1 for _ in self._params()) ** 0.5
            before = self.optimizer.param_groups[0].get("clip_norm")
            if before is not None:
                before = before.to(norm.device)
                first = torch.where(before.isnan(), first, before.to(norm.dtype))
            seen = torch.maximum(norm, first)
        factor = (self.max_norm / seen).clamp(max=1.0)
        values.mul_(torch.where(norm.isfinite() & (seen > 0), factor, 1.0))


def vector_norm(tensor: Tensor) -> Tensor:
    """The 2-norm of all elements in fp32 or wider, 0-d, an eighth at a time: a CPU converts a copy."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim == 0 or tensor.dtype == wide:
        return torch.linalg.vector_norm(tensor, dtype=wide)
    return torch.stack([torch.linalg.vector_norm(part, dtype=wide) for part in eighths(tensor)]).norm()


def eighths(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in at most eight parts."""
    yield from tensor.chunk(8)
