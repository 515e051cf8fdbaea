"""Error feedback in the coefficients of a fixed basis."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.int8_blocks import blocks, dequantize, quantize_
from lowrank_optim.optim.finite import is_finite
from lowrank_optim.optim.options import one_of
from lowrank_optim.optim.parts import Group, Lift, Option, Slot, Slots, State, Step, Update, View
from lowrank_optim.optim.state_storage import load_moment, moment_slots, replace_moment_
from lowrank_optim.optim.subspaces.fixed_basis import add_coefficients_, coefficients

ERROR_FEEDBACKS = (None, "full", "int8")


def transforms(group: Group) -> bool:
    """Whether every step needs all coefficients of the gradient: for a selection, or to keep those left out."""
    return group["update_proj_gap"] == 1 or group["error_feedback"] is not None


def clear_columns_(matrix: Tensor, indices: Tensor) -> None:
    """matrix[..., indices] = 0."""
    if indices.ndim == 1:
        matrix.index_fill_(-1, indices, 0)
    else:
        matrix.scatter_(-1, indices.unsqueeze(-2).expand(*matrix.shape[:-1], indices.shape[-1]), 0)


class ErrorFeedback(Lift):
    """What the selected columns leave of a gradient is added to the next one.

    All of it happens in coefficients, S = G D + E, where the error is S with the selected columns set to zero:
    no product forms the residual, and S is the only full-size temporary. ``error`` is E, stored as
    ``state_dtype`` says; or ``error.codes`` and ``error.scale`` hold it in linear blockwise int8.
    """

    changes_gradient = True
    passes_direction = True
    splits = frozenset({"rows"})
    options = {"error_feedback": Option(one_of(*ERROR_FEEDBACKS), None)}

    def reads_gradient(self, group: Group) -> bool:
        """Only for its transform."""
        return transforms(group)

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        if group["error_feedback"] is None:
            return {}
        if group["error_feedback"] == "full":
            return moment_slots("error", shape, view.wide, group["state_dtype"], "elements")
        # A complex number is two values.
        shape = (*shape[:-1], 2 * shape[-1]) if view.wide.is_complex else shape
        return {
            "error.codes": Slot(shape, torch.int8, "elements"),
            "error.scale": Slot((blocks(shape),), torch.float32),
        }

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The gradient's coefficients and the error, where the step needs all of them; else the gradient."""
        if not transforms(group):
            return grad
        if group["error_feedback"] is None:
            return coefficients(grad, group["basis"], group["similarity"])
        dtype = torch.promote_types(grad.dtype, torch.float32)
        if group["error_feedback"] == "full":
            total = load_moment(state, "error", grad.dtype).clone()
        else:
            total = dequantize(state["error.codes"], state["error.scale"], dtype.to_real())
            total = torch.view_as_complex(total.view(*total.shape[:-1], -1, 2)) if dtype.is_complex else total
        add_coefficients_(total, grad, group["basis"], group["similarity"])
        return total

    def update(self, step: Step, state: State, group: Group) -> Update:
        return Update(step.direction)

    def after(self, step: Step, state: State, group: Group) -> None:
        """The error becomes what was not selected."""
        if group["error_feedback"] is None:
            return
        error = step.grad
        clear_columns_(error, state["indices"])
        if group["error_feedback"] == "full":
            replace_moment_(state, "error", error, step.ok)
        else:
            values = torch.view_as_real(error).flatten(-2) if error.is_complex() else error
            where = is_finite(step.ok) if isinstance(step.ok, Tensor) else None
            quantize_(state["error.codes"], state["error.scale"], values, where=where)
