"""What Fira and APOLLO share: the raw gradient, row by row rescaled to Adam's length, its growth limited."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import Sums
from lowrank_optim.optim.options import number, optional
from lowrank_optim.optim.parts import Group, Lift, Norms, Option, Slot, Slots, State, View

# The published guard of both divisions.
GUARD = 1e-8
# A previous norm below this share of the direction's own norm says nothing about the present one.
DEAD = 1e-3


class Factors(NamedTuple):
    """How much longer Adam's direction N is than the low-rank gradient R.

    phi: ||N|| / (||R|| + 1e-8), shape (..., rows, 1), or (..., 1, 1) where one factor stands for the whole matrix.
    direction: ||N|| of every matrix, (..., 1, 1).
    """

    phi: Tensor
    direction: Tensor


def norm_of(rows: Tensor, sums: Sums | None) -> Tensor:
    """The norm of every matrix, (..., 1, 1), from the norms of its rows, of which a process may have some."""
    if sums is not None:
        return sums.sum_(rows.square().sum((-2, -1), keepdim=True)).sqrt_()
    return torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True)


def factors(norms: Norms, sums: Sums | None = None, *, whole: bool = False) -> Factors:
    """:class:`Factors` from the norms of rows; ``whole``: one for the matrix."""
    norm = norm_of(norms.direction, sums)
    if whole:
        return Factors(norm / (norm_of(norms.low, sums) + GUARD), norm)
    return Factors(norms.direction / (norms.low + GUARD), norm)


class GrowthLimiter(Lift):
    """Lets the norm of an update grow by the factor ``limiter_gamma`` a step and fall freely (Fira, section 3.3).

    The state ``update_norm`` is the norm of every matrix after limiting, 0 where there was none yet. A previous norm
    that is nearly nothing limits nothing: growth by 1 % from the 1e-8 that a zero gradient leaves would take 1600
    steps.
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
        growth = (norm / ((previous + GUARD) * gamma)).clamp_min(1)
        growth = torch.where(previous > DEAD * direction, growth, 1)
        previous.copy_(torch.where(finite, norm / growth, previous))
        return torch.where(finite, growth.reciprocal_(), 0)
