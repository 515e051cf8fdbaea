"""A momentum of the whole matrix, kept in the coefficients of a fixed basis (Trion)."""

from __future__ import annotations

import math

from torch import Tensor

from lowrank_optim.optim.options import number, one_of
from lowrank_optim.optim.parts import Group, Lift, Option, Slots, State, Step, Update, View
from lowrank_optim.optim.state_storage import load_moment, moment_slots, replace_moment_
from lowrank_optim.optim.subspaces.fixed_basis import add_coefficients_

SCALINGS = ("kj", "dion", "kimi", "none")


def update_scale(rows: int, columns: int, scaling: str) -> float:
    """The factor of an update whose singular values are about 1, from the weight's shape (out, in)."""
    return {
        "kj": math.sqrt(max(1, rows / columns)),
        "dion": math.sqrt(rows / columns),
        "kimi": 0.2 * math.sqrt(max(rows, columns)),
        "none": 1.0,
    }[scaling]


def check_precision(group: Group) -> None:
    """Raise ValueError where a momentum that is orthogonalised would be stored in 4 bits.

    Small singular values are raised to the size of the largest, and with them the rounding of these.
    """
    if group["rank"] is not None and group["state_dtype"] == "int4":
        raise ValueError(
            "Invalid state_dtype: 'int4' for a momentum that is orthogonalised, expected 'float32', 'bfloat16' or "
            "'int8'; groups with rank=None may have 'int4'"
        )


class Momentum(Lift):
    """A momentum of which only the part that is used decays.

    In coefficients, S = B + G D, of which the step takes the selected columns; then B is S with these scaled down.
    The state ``momentum`` is B. S is the only full-size temporary.
    """

    changes_gradient = True
    splits = frozenset({"rows"})
    options = {
        "momentum": Option(number(0.0, 1.0, high_open=True), 0.95),
        "scaling": Option(one_of(*SCALINGS), "kj"),
    }

    def check(self, group: Group) -> None:
        check_precision(group)

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        return moment_slots("momentum", shape, view.wide, group["state_dtype"], "elements")

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The coefficients of momentum and gradient."""
        total = load_moment(state, "momentum", grad.dtype).clone()
        add_coefficients_(total, grad, group["basis"], group["similarity"])
        return total

    def update(self, step: Step, state: State, group: Group) -> Update:
        rows, columns = step.shape[-2:]
        if state["left"]:
            rows, columns = columns, rows
        return Update(step.direction, scale=update_scale(rows, columns, group["scaling"]))

    def after(self, step: Step, state: State, group: Group) -> None:
        """The selected part of the momentum decays."""
        total, indices = step.grad, state["indices"]
        index = indices.view(*indices.shape[:-1], 1, -1).expand(step.low.shape)
        total.scatter_(-1, index, (step.low * group["momentum"]).to(total.dtype))
        replace_moment_(state, "momentum", total, step.ok)
