"""What an optimizer does to parameters that are alike, run for one of them and repeated for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from lowrank_optim.memory.tracker import Tracker
from lowrank_optim.optim.accumulation import Accumulator
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.in_backward import StepInBackward
from lowrank_optim.optim.parts import Group, State
from lowrank_optim.optim.plans import Plan
from lowrank_optim.optim.schedule import refresh_due
from lowrank_optim.optim.weight_storage import is_quantized


def _layout(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


class Alike:
    """Runs what is done to a parameter, or repeats what was done to another of its group, shape and state.

    Factors of a layer, of which one update may move several, stand in a group of their own.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def once(
        self, plan: Plan, grad: Tensor, group: Group, run: Callable[[], Any], *kind: Any, state: State | None = None
    ) -> Any:
        """The result of ``run``, which changes ``state``, else that of the plan, and may depend on ``kind``."""
        due = refresh_due(plan.state, group, plan.place)
        values = [(name, _layout(value)) for name, value in plan.state.items() if name != "seed"]
        key = (*kind, id(group), plan.shape, plan.dtype, plan.view, due, *values, _layout(grad))
        return self.tracker.alike(key, plan.state if state is None else state, run)

    def updates_(self, optimizer: LowRankOptimizer) -> None:
        """Let an optimizer update parameters that are alike once."""
        update_param, step_low, refresh = optimizer.update_param, optimizer.step_low, optimizer.refresh

        def updated(param: Tensor, grad: Tensor, group: Group, *rest: Any) -> None:
            run = partial(update_param, param, grad, group, *rest)
            self.once(optimizer.plan_of(param, group), grad, group, run, "update", param.stride(), is_quantized(param))

        def stepped(param: Tensor, low: Tensor, group: Group) -> None:
            run = partial(step_low, param, low, group)
            self.once(optimizer.plan_of(param, group), low, group, run, "low", param.stride(), is_quantized(param))

        def refreshed(plan: Plan, grad: Tensor, group: Group, *, is_scheduled: bool) -> Any:
            run = partial(refresh, plan, grad, group, is_scheduled=is_scheduled)
            return self.once(plan, grad, group, run, "refresh", is_scheduled)

        optimizer.update_param = updated  # type: ignore[assignment, method-assign]
        optimizer.step_low = stepped  # type: ignore[method-assign]
        optimizer.refresh = refreshed  # type: ignore[method-assign]

    def clipping_(self, handle: StepInBackward) -> None:
        """Let updates in the backward pass clip gradients that are alike once."""
        clip_ = handle._clip_

        def clipped(grad: Tensor) -> None:
            state: dict[str, Tensor] = {}

            def run() -> None:
                clip_(grad)
                state["norm"] = handle._norms.pop()

            self.tracker.alike(("clip", _layout(grad)), state, run)
            handle._norms.append(state["norm"])

        handle._clip_ = clipped  # type: ignore[method-assign]

    @contextmanager
    def sums(self) -> Iterator[None]:
        """Let micro-batches be added, and bases renewed from sums, once for those that are alike."""
        add, renew, once = Accumulator.add, Accumulator._renew, self.once

        def added(self: Accumulator) -> None:
            grad, run = self.param.grad, partial(add, self)
            if grad is not None:
                kind = "add", self.terms, self.has_basis, self.renews, _layout(self.low), _layout(self.sketch)
                once(self.plan, grad, self.group, run, *kind, state=vars(self))
                self.param.grad = None

        def renewed(self: Accumulator, low: Tensor, sketch: Tensor | None) -> None:
            once(self.plan, low, self.group, partial(renew, self, low, sketch), "renew", _layout(sketch))

        Accumulator.add, Accumulator._renew = added, renewed  # type: ignore[method-assign]
        try:
            yield
        finally:
            Accumulator.add, Accumulator._renew = add, renew  # type: ignore[method-assign]
