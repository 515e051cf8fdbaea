"""What an optimizer does to parameters that are alike, run for one of them and repeated for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor

from lowrank_optim.memory.tracker import Tracker
from lowrank_optim.optim.accumulation import Accumulator
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.in_backward import StepInBackward
from lowrank_optim.optim.parts import Group
from lowrank_optim.optim.plans import Plan
from lowrank_optim.optim.schedule import refresh_due
from lowrank_optim.optim.weight_storage import is_quantized

# What a call changes, and what it depends on.
Described = tuple[dict[str, Any], Hashable]


@contextmanager
def repeated(tracker: Tracker, optimizer: LowRankOptimizer) -> Iterator[None]:
    """Within it what is done to a parameter is run, or repeated from another one of its group, shape and state.

    Factors of a layer, of which one update may move several, stand in a group of their own.
    """

    def once(function: Callable[..., Any], described: Callable[..., Described]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            state, key = described(*args, **more)
            return tracker.alike((function.__name__, key), state, partial(function, *args, **more))

        return run

    def of_plan(plan: Plan, grad: Tensor | None, group: Group, *kind: Any, **more: Any) -> Described:
        due = refresh_due(plan.state, group, plan.place)
        values = [(name, _layout(value)) for name, value in plan.state.items() if name != "seed"]
        key = (id(group), plan.shape, plan.dtype, plan.view, due, *values, _layout(grad), *kind, *more.values())
        return plan.state, key

    def of_param(param: Tensor, grad: Tensor, group: Group, *_: Any) -> Described:
        return of_plan(optimizer.plan_of(param, group), grad, group, param.stride(), is_quantized(param))

    def of_sums(sums: Accumulator) -> Described:
        kind = sums.terms, sums.has_basis, sums.renews, _layout(sums.low), _layout(sums.sketch)
        return vars(sums), of_plan(sums.plan, sums.param.grad, sums.group, *kind)[1]

    def of_sketch(sums: Accumulator, low: Tensor, sketch: Tensor | None) -> Described:
        return of_plan(sums.plan, low, sums.group, _layout(sketch))

    add, clip_ = once(Accumulator.add, of_sums), StepInBackward._clip_

    def added(sums: Accumulator) -> None:
        # Held until it is added: its end is not what is repeated.
        if (grad := sums.param.grad) is not None:
            add(sums)
            del grad
            sums.param.grad = None

    def clipped(handle: StepInBackward, grad: Tensor) -> None:
        state: dict[str, Tensor] = {}

        def run() -> None:
            clip_(handle, grad)
            state["norm"] = handle._norms.pop()

        tracker.alike(("clip", _layout(grad)), state, run)
        handle._norms.append(state["norm"])

    with ExitStack() as stack:
        for owner, name, replacement in (
            (optimizer, "update_param", once(optimizer.update_param, of_param)),
            (optimizer, "step_low", once(optimizer.step_low, of_param)),
            (optimizer, "refresh", once(optimizer.refresh, of_plan)),
            (Accumulator, "add", added),
            (Accumulator, "_renew", once(Accumulator._renew, of_sketch)),
            (StepInBackward, "_clip_", clipped),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _layout(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
