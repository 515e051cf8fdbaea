"""One update of the parameters: the one that trains, and that lowrank-memory simulates and measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.nn.restarts import Restart
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.replay import ReplayedStep
from lowrank_optim.optim.views import is_sharded
from lowrank_optim.pretrain import steps
from lowrank_optim.pretrain.batches import Batch
from lowrank_optim.pretrain.build import replays, start_in_backward
from lowrank_optim.pretrain.config import Resolved
from lowrank_optim.pretrain.schedule import build_schedule
from lowrank_optim.pretrain.sizes import GradientBytes
from lowrank_optim.pretrain.steps import LossSum


class _Alone:
    """What an update asks of an ``Accelerator``, for a single process without one."""

    num_processes = 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        return nullcontext()


ALONE = _Alone()


class Update(NamedTuple):
    """Result of one update; ``made`` is False if it was skipped because something was not finite."""

    loss: float
    grad_norm: float
    lr: float
    made: bool


class Updater:
    """Makes updates: forward and backward per micro-batch, clipping, step, schedule.

    Args:
        run: says how.
        model: what is trained; ``network``, which computes the sum of a micro-batch's losses, may be wrapped.
        optimizer: of its parameters; where ``run.per_layer`` is set, they are updated in the backward pass from now on.
        network: computes that sum, where it exists already.
        restarts: what raises the learning rate again after a restart.
        processes: an ``Accelerator`` where several processes train together.
        phase: surrounds "forward", "backward" and "update", for those who want to know where memory goes.

    Raises:
        ValueError: an optimizer that cannot update one parameter at a time, with ``run.per_layer``.
    """

    def __init__(
        self,
        run: Resolved,
        model: Any,
        optimizer: Optimizer,
        *,
        network: nn.Module | None = None,
        restarts: Sequence[Restart] = (),
        processes: Any = ALONE,
        phase: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> None:
        self.run, self.model, self.optimizer, self.restarts = run, model, optimizer, restarts
        self.processes, self.phase = processes, phase
        self.network: Any = network or LossSum(model, chunked=run.chunked_loss)
        self.schedule = build_schedule(optimizer, warmup=run.warmup_steps, total=run.max_steps)
        # Hooks run in the order of their registration: around those that use gradients up.
        self.gradient_bytes = GradientBytes(self._sums) if run.per_layer else None
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.gradient_bytes:
            for p in trained:
                p.register_post_accumulate_grad_hook(self.gradient_bytes.arrives)
        # Sharded gradients are means over the processes when a hook sees them.
        copies = processes.num_processes > 1 and not any(is_sharded(p) for p in trained)
        self.in_backward = start_in_backward(run, optimizer, dist.group.WORLD if copies else None)
        self.step: Callable[[], object] = optimizer.step
        if replays(run, model):
            assert isinstance(optimizer, LowRankOptimizer)
            self.step = ReplayedStep(optimizer)
        if self.gradient_bytes:
            for p in trained:
                p.register_post_accumulate_grad_hook(self.gradient_bytes.leaves)

    def _sums(self, param: Tensor) -> list[Tensor | None]:
        sums = self.in_backward and self.in_backward.sums(param)
        return [sums.low, sums.sketch] if sums else []

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, to continue from."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "restarts": [restart.state_dict() for restart in self.restarts],
            "in_backward": self.in_backward.state_dict() if self.in_backward else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for restart, saved in zip(self.restarts, state["restarts"], strict=True):
            restart.load_state_dict(saved)
        if self.in_backward:
            self.in_backward.load_state_dict(state["in_backward"])

    def __call__(
        self,
        batches: Sequence[Batch],
        tokens: int,
        *,
        stepped: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> Update:
        """One update.

        Args:
            batches: the micro-batches of this process.
            tokens: how many count in the loss, over all micro-batches and processes.
            stepped: called after the step, while the gradients are still there.
            between: called between micro-batches; what it raises ends the update, as if it had not begun.
        """
        loss_value = self._accumulate(batches, tokens, between)
        with self.phase("update"):
            norm = self._clip()
            lr = float(self.optimizer.param_groups[0]["lr"]) * math.prod(r.lr_factor for r in self.restarts)
            made = math.isfinite(loss_value) and math.isfinite(norm)
            if made:
                # Updates that the backward pass has made are not made again.
                self.step()
                stepped()
            self._free_gradients()
            self.schedule.step()
        return Update(loss_value, norm, lr, made)

    def _accumulate(self, batches: Sequence[Batch], tokens: int, between: Callable[[], None]) -> float:
        """Gradients of all micro-batches, and the mean loss over their tokens."""
        loss: Any = 0.0
        for number, batch in enumerate(batches, 1):
            if number > 1:
                try:
                    between()
                except BaseException:
                    self._abandon()
                    raise
            with self._around(last=number == len(batches)):
                loss = loss + self._backward(batch, tokens)
        return float(self.processes.reduce(loss, reduction="sum").item())

    def _abandon(self) -> None:
        if self.in_backward is not None:
            self.in_backward.abandon()
        self._free_gradients()

    def _free_gradients(self) -> None:
        # A graph reads them where they were.
        self.optimizer.zero_grad(set_to_none=not self.run.graph_step)

    def _backward(self, batch: Batch, tokens: int) -> Tensor:
        with self.phase("forward"):
            part: Tensor = self.network(batch.to(self.model.device)) / tokens
        with self.phase("backward"):
            # Gradients are averaged over the processes, the loss is a sum over them.
            self.processes.backward(part * self.processes.num_processes)
        return part.detach()

    def _around(self, *, last: bool) -> AbstractContextManager[Any]:
        """What surrounds forward and backward pass of one micro-batch."""
        if self.in_backward is None:
            return nullcontext() if last else self.processes.no_sync(self.network)
        stack = ExitStack()
        for restart in self.restarts:
            stack.enter_context(restart.ramped())
        stack.enter_context(self.in_backward.micro_batch(last))
        return stack

    def _clip(self) -> float:
        norm: Any
        if self.in_backward is not None:
            norm = self.in_backward.grad_norm
        else:
            norm = steps.clip_gradients_(self.model.parameters(), self.run.grad_clip)
        return float(norm.item())
