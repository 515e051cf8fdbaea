"""What Fira and APOLLO share: the raw gradient, row by row rescaled to Adam's length, its growth limited."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import column_norms
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.fused import Terms
from lowrank_optim.optim.protocols import Group, State, Subspace

SIDES = ("std", "reverse_std", "left", "right")

# The published guard of both divisions.
GUARD = 1e-8
# A previous norm below this share of the direction's own norm says nothing about the present one.
DEAD = 1e-3


class Factors(NamedTuple):
    """How much longer Adam's direction N is than the low-rank gradient R.

    phi: ||N|| / (||R|| + 1e-8), shape (rows, 1), or (1, 1) where one factor stands for the whole matrix.
    low: ||R|| by row, shape (rows, 1).
    direction: ||N||, 0-d.
    """

    phi: Tensor
    low: Tensor
    direction: Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether a non-finite gradient has been turned away already, as the base does on the CPU only."""
    return tensor.device.type == "cpu"


def row_norms(tensor: Tensor) -> Tensor:
    """Norm of every row, (rows, 1), in fp32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if on_host(tensor) and tensor.stride(-1) > 1 and not tensor.is_complex():
        # Against the layout the CPU's own norm takes 0.37 ms for a (1376, 512) matrix, this 0.08.
        return column_norms(tensor.mT, 2).sqrt_().unsqueeze(-1)
    return torch.linalg.vector_norm(tensor, dim=-1, keepdim=True, dtype=wide)


def factors(low: Tensor, direction: Tensor, *, whole: bool = False) -> Factors:
    """:class:`Factors` of the row norms (rows, 1) of R and of N; ``whole``: one for the matrix."""
    norm = torch.linalg.vector_norm(direction)
    if whole:
        return Factors((norm / (torch.linalg.vector_norm(low) + GUARD)).view(1, 1), low, norm)
    return Factors(direction / (low + GUARD), low, norm)


class GrowthLimiter:
    """Lets the norm of an update grow by the factor ``limiter_gamma`` a step and fall freely (Fira, section 3.3).

    state["update_norm"] is the norm after limiting, fp32, 0 where there was none yet. A previous norm that is nearly
    nothing limits nothing: growth by 1 % from the 1e-8 that a zero gradient leaves would take 1600 steps.
    """

    measures = True

    def validate(self, group: Group) -> None:
        """Raise ValueError on a limiter_gamma below 1 and on a side that has no channels."""
        check_choice("proj_type", group["proj_type"], SIDES)
        if group["limiter_gamma"] is not None:
            check_range("limiter_gamma", group["limiter_gamma"], low=1.0)

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """``update_norm``."""
        dtype = torch.promote_types(param.dtype, torch.float32).to_real()
        state["update_norm"] = torch.zeros((), dtype=dtype, device=param.device)

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The gradient itself."""
        return grad

    def limit(self, norm: Tensor, direction: Tensor, state: State, group: Group) -> Tensor:
        """What an update of this norm is to be multiplied with, 0-d; 0 where the norm is not finite.

        Args:
            norm: of the update before limiting, 0-d.
            direction: norm of Adam's direction, the measure of "nearly nothing", 0-d.
        """
        previous, gamma = state["update_norm"], group["limiter_gamma"]
        # A comparison is one operation on the device, isfinite() four.
        finite = norm < math.inf
        if gamma is None:
            return finite.to(norm.dtype)
        growth = (norm / ((previous + GUARD) * gamma)).clamp_min(1)
        growth = torch.where(previous > DEAD * direction, growth, 1)
        previous.copy_(torch.where(finite, norm / growth, previous))
        return torch.where(finite, growth.reciprocal_(), 0)


def add_scaled_(target: Tensor, grad: Tensor, factor: Tensor) -> None:
    """target += factor * grad; rows with a factor of 0 stay as they are, whatever the gradient holds.

    Args:
        target: (rows, columns).
        grad: (rows, columns).
        factor: (rows, 1) or (1, 1).
    """
    if not on_host(grad):
        # Zero times NaN is NaN, and whether there is one only the device knows.
        grad = torch.where(factor != 0, grad, 0)
    # A mixed operation on the CPU would copy both matrices to fp32. fp16 has not the range of the factors.
    target.addcmul_(grad, factor.to(target.dtype) if target.dtype is torch.bfloat16 else factor)


def add_terms_(target: Tensor, grad: Tensor, terms: Terms, subspace: Subspace, state: State, group: Group) -> None:
    """target += alpha up(low) + factor grad."""
    if terms.low is not None:
        subspace.add_up_(target, terms.low, state, group, alpha=terms.alpha)
    if terms.factor is not None:
        add_scaled_(target, grad, terms.factor)
