"""A step without a full-size temporary: one kernel projects and measures, one moves the weight as it is stored.

Only with Triton, and only for updates that are :class:`Terms`; everything else goes through ``Lift.apply_``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.project import project
from lowrank_optim.optim.storage import move_stored_

if TYPE_CHECKING:
    from lowrank_optim.optim.base import LowRankOptimizer
    from lowrank_optim.optim.protocols import Group, State, Subspace

# Matrix units multiply these and sum in fp32.
NARROW = (torch.bfloat16, torch.float16)


class Terms(NamedTuple):
    """An update of an oriented weight: alpha up(low) + factor grad.

    low: (rows, rank), or None for nothing to lift.
    factor: (rows, 1) or (1, 1), or None for no gradient.
    """

    low: Tensor | None = None
    alpha: float | Tensor = 1.0
    factor: Tensor | None = None


class Norms(NamedTuple):
    """Norms of every row, (rows, 1) each, of the low-rank gradient, of its direction and of the gradient."""

    low: Tensor
    direction: Tensor
    grad: Tensor


def fuses(param: Tensor, subspace: Subspace, rule: Any, lift: Any, group: Group) -> bool:
    """Whether a parameter that is compressed is updated here.

    The parts must be made for it: a lift with ``terms``, a subspace with ``basis``, a rule with ``measured_direction``.
    """
    if not (hasattr(lift, "terms") and hasattr(subspace, "basis") and hasattr(rule, "measured_direction")):
        return False
    if param.dtype not in (torch.float32, *NARROW) or torch.compiler.is_compiling():
        return False
    if group["backend"] is None and param.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        # Products without matrix units are cuBLAS' to make.
        return False
    return pick(lowrank_update_, group["backend"], param.device) is not lowrank_update_


def measured_down(grad: Tensor, subspace: Any, state: State, group: Group) -> tuple[Tensor, Tensor]:
    """``subspace.down`` of an oriented gradient, in fp32, and the norms of the gradient's rows (rows, 1)."""
    return pick(project, group["backend"], grad.device)(grad, subspace.basis(grad, state, group))


def fused_update_(
    optimizer: LowRankOptimizer, param: Tensor, grad: Tensor | None, low: Tensor, subspace: Any, lift: Any,
    state: State, group: Group, *, row_norms: Tensor | None,
) -> None:  # fmt: skip
    """Direction, lift and decay of one parameter; ``state["step"]`` counts this update already.

    Args:
        param: as it is stored, not oriented.
        grad: oriented; None where the lift does not measure.
        row_norms: of ``grad``, where the lift measures.
    """
    rule: Any = optimizer.rule_of(subspace)
    basis = subspace.basis(subspace.orient(param, state), state, group)
    alpha = optimizer.step_size(rule, state, group)
    norms = None
    if row_norms is None:
        direction = rule.direction(low, state, group)
    else:
        direction, low_rows, direction_rows = rule.measured_direction(low, state, group)
        norms = Norms(low_rows, direction_rows, row_norms)
    update = lift.terms(low, direction, basis, norms, state, group, alpha=alpha)
    low, alpha, factor = update
    decay = 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] != 0 else 1.0
    if not optimizer.decay_first:
        # decay (W + U) = decay W + decay U
        alpha = alpha * decay
        factor = None if factor is None else factor * decay
    left, right = (None, None) if low is None else (low, basis)
    grad = None if factor is None else grad
    if state["left"]:
        # (X Pᵀ)ᵀ = P Xᵀ: the kernel sees the parameter in its own layout.
        left, right = right, left
        grad, factor = (None if tensor is None else tensor.mT for tensor in (grad, factor))
    move_stored_(
        param, left, right, state, group["weight_rounding"], group["backend"],
        alpha=alpha, decay=decay, grad=grad, factor=factor,
    )  # fmt: skip
