"""One update of the parameters: the one that trains, and that lowrank-memory simulates and measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lowrank_optim.nn.restarts import Restart
from lowrank_optim.optim.in_backward import StepInBackward
from lowrank_optim.pretrain import steps
from lowrank_optim.pretrain.data import Batch

Phase = Callable[[str], AbstractContextManager[Any]]


class Processes(Protocol):
    """What an update needs of the processes that train together; an ``Accelerator`` is one."""

    num_processes: int

    def backward(self, loss: Tensor) -> None: ...

    def reduce(self, tensor: Tensor, reduction: str) -> Any: ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]: ...


class Alone:
    """A single process without accelerate."""

    num_processes = 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()


class Update(NamedTuple):
    """What became of one update; ``made`` is False where it was left out because something was not finite."""

    loss: float
    grad_norm: float
    lr: float
    made: bool


class Updater:
    """Makes updates: forward and backward per micro-batch, clipping, step, schedule.

    Args:
        network: returns the sum of a micro-batch's losses, see :class:`lowrank_optim.pretrain.steps.LossSum`.
        optimizer, schedule: step once an update.
        grad_clip: largest gradient norm, 0 for no clipping; ``in_backward`` clips by itself.
        in_backward: updates in the backward pass, None where ``optimizer.step`` makes them.
        restarts: what raises the learning rate again after a restart.
        processes: an ``Accelerator`` where several processes train together.
        phase: surrounds "forward", "backward" and "update", for those who want to know where memory goes.
    """

    def __init__(
        self,
        network: Any,
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        grad_clip: float,
        in_backward: StepInBackward | None = None,
        restarts: Sequence[Restart] = (),
        processes: Processes | None = None,
        phase: Phase = lambda _: nullcontext(),
    ) -> None:
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.grad_clip, self.in_backward, self.restarts = grad_clip, in_backward, restarts
        self.processes: Processes = processes or Alone()
        self.phase = phase
        self.device = next(network.parameters()).device

    def __call__(self, batches: Sequence[Batch], tokens: int, *, stepped: Callable[[], None] = lambda: None) -> Update:
        """One update.

        Args:
            batches: the micro-batches of this process.
            tokens: how many count in the loss, over all micro-batches and processes.
            stepped: called after the step, while the gradients are still there.
        """
        loss_value = self._accumulate(batches, tokens)
        with self.phase("update"):
            norm = self._clip()
            lr = float(self.optimizer.param_groups[0]["lr"]) * math.prod(r.lr_factor for r in self.restarts)
            made = math.isfinite(loss_value) and math.isfinite(norm)
            if made:
                # Updates that the backward pass has made are not made again.
                self.optimizer.step()
                stepped()
            self.optimizer.zero_grad()
            self.schedule.step()
        return Update(loss_value, norm, lr, made)

    def _accumulate(self, batches: Sequence[Batch], tokens: int) -> float:
        """Gradients of all micro-batches, and the mean loss over their tokens."""
        loss: Any = 0.0
        for number, batch in enumerate(batches, 1):
            with self._around(last=number == len(batches)):
                loss = loss + self._backward(batch, tokens)
        return float(self.processes.reduce(loss, reduction="sum").item())

    def _backward(self, batch: Batch, tokens: int) -> Tensor:
        with self.phase("forward"):
            part: Tensor = self.network(batch.to(self.device)) / tokens
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
            norm = steps.clip_gradients_(self.network.parameters(), self.grad_clip)
        return float(norm.item())
