"""What Fira and APOLLO share: the raw gradient, row by row rescaled to Adam's length, its growth limited."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.limited_scale import excess, limited_scale
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

    def limit(self, norm: Tensor, direction: Tensor | float, state: State, group: Group) -> Tensor:
        """What an update of this norm is multiplied with, (..., 1, 1); 0 where the norm is not finite.

        Args:
            norm: of the update before limiting, (..., 1, 1).
            direction: norm of Adam's direction, (..., 1, 1), or what is usual: the measure of "nearly nothing".
        """
        previous, gamma = state["update_norm"].view(norm.shape), group["limiter_gamma"]
        # A comparison is one operation on the device, isfinite() four.
        finite = norm < math.inf
        if gamma is None:
            return finite.to(norm.dtype)
        growth = excess(norm, previous, direction, gamma)
        previous.copy_(torch.where(finite, norm / growth, previous))
        return torch.where(finite, growth.reciprocal_(), 0)

    def limited(self, step: Step, state: State, group: Group, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Scales of rows and what is projected back: :func:`lowrank_optim.ops.limited_scale.limited_scale`."""
        assert step.norms is not None
        of_low, of_grad = step.norms
        compiling = torch.compiler.is_compiling()
        eager = of_low.dtype != torch.float32 or compiling
        operation = limited_scale if eager else pick(limited_scale, group["backend"], of_low.device)
        gamma = group["limiter_gamma"]
        scale, norm, left = operation(of_low, of_grad, state["update_norm"], gamma=gamma, sums=step.sums, **options)
        if group["capturable"] or compiling:
            # A graph reads it where it was.
            state["update_norm"].copy_(norm)
        else:
            state["update_norm"] = norm
        return scale, left
