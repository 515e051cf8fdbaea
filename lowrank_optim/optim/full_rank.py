"""What is not compressed: the rule on the gradient as it is, in slices where that saves memory."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowrank_optim.optim.finite import finite_values, zero_unless
from lowrank_optim.optim.parts import Group, Rule, Scalar, State
from lowrank_optim.optim.state_storage import slices
from lowrank_optim.optim.weight_storage import is_quantized, writable


class Method(Protocol):
    """What a method may replace; see :class:`lowrank_optim.optim.engine.LowRankOptimizer`."""

    @property
    def decay_first(self) -> bool: ...

    def add_direction_(
        self, target: Tensor, rule: Rule, grad: Tensor, state: State, group: Group, size: Scalar, sign: float
    ) -> None: ...

    def finish_(self, target: Tensor, group: Group) -> None: ...


def step_full_rank_(
    method: Method, param: Tensor, grad: Tensor, rule: Rule, state: State, group: Group, ok: bool | Tensor,
    *, size: Scalar, sign: float, decay: Scalar,
) -> None:  # fmt: skip
    """Move one parameter that is not compressed; ``state["step"]`` counts this update already.

    Args:
        ok: the verdict on the gradient, see :mod:`lowrank_optim.optim.finite`; not read where the rule is elementwise.
        size, sign: of the step; a rule that keeps a mean of its updates takes the size into it.
        decay: what the weight is multiplied with.
    """
    if rule.elementwise and not is_quantized(param) and not param.is_complex():
        # Otherwise the decay is of the update too.
        alpha = sign * size if method.decay_first else sign * size * decay
        if rule.update_(param, grad, state, group, size=alpha, decay=decay):
            return
    target, slope = (torch.view_as_real(t) if t.is_complex() else t for t in (param, grad))
    # A slice of a quantized weight would not know where its values are.
    whole = is_quantized(param) or not rule.elementwise
    for part, (values, some) in [(state, (target, slope))] if whole else slices(state, target, slope):
        with writable(values, part, group["weight_rounding"]) as weight:
            if method.decay_first and group["weight_decay"] != 0:
                weight.mul_(decay)
            usable = finite_values(some) if rule.elementwise else zero_unless(ok, some)
            method.add_direction_(weight, rule, usable, part, group, size, sign)
            if not method.decay_first and group["weight_decay"] != 0:
                weight.mul_(decay)
            method.finish_(weight, group)
