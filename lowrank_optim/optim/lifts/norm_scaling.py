"""What Fira and APOLLO share: the raw gradient, row by row rescaled to Adam's length, its growth limited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.limited_scale import limited_scale
from lowrank_optim.optim.options import number, optional
from lowrank_optim.optim.parts import Group, Lift, Option, Slot, Slots, State, Step, View


class GrowthLimiter(Lift):
    """Lets the norm of an update grow by the factor ``limiter_gamma`` a step and fall freely (Fira, section 3.3).

    The state ``update_norm`` is the norm of every matrix after limiting, 0 where there was none yet.
    """

    needs_norms = True
    splits = frozenset({"rows", "columns"})
    options = {"limiter_gamma": Option(optional(number(1.0)), 1.01)}

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        return {"update_norm": Slot(view.batch, view.wide.to_real())}

    def limited(self, step: Step, state: State, group: Group, **options: Any) -> tuple[Tensor, Tensor | None]:
        """:func:`lowrank_optim.ops.limited_scale.limited_scale` of this step."""
        assert step.norms is not None
        of_low, of_grad = step.norms
        operation = pick(limited_scale, group["backend"], of_low.device)
        if of_low.dtype != torch.float32 or torch.compiler.is_compiling():
            operation = limited_scale
        return operation(of_low, of_grad, state["update_norm"], gamma=group["limiter_gamma"], sums=step.sums, **options)
