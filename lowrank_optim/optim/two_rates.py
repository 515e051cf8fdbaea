"""Methods whose matrices want another learning rate than the parameters that get AdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.options import number, optional
from lowrank_optim.optim.parts import Group, Option, Scalar
from lowrank_optim.optim.plans import Plan


class TwoRates(LowRankOptimizer):
    """AdamW's learning rate stays at the ratio adamw_lr / lr of the group's ``lr``, so that a schedule drives both.

    A group that names its ``lr`` and no ``adamw_lr`` keeps it for all of its parameters, and so do all groups with
    ``adamw_lr=None``. Decay goes by the rate of the parameter.
    """

    options = {"adamw_lr": Option(optional(number()), None), "adamw_share": Option(number(), 1.0)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one with an ``lr`` of its own and no ``adamw_lr`` keeps it for AdamW too."""
        own = "lr" in param_group and "adamw_lr" not in param_group
        group = {**self.defaults, **param_group}
        share = 1.0 if own or group["adamw_lr"] is None else ratio(group["adamw_lr"], group["lr"])
        super().add_param_group({"adamw_share": share, **param_group})

    def step_size(self, plan: Plan, param: Tensor, group: Group) -> tuple[Scalar, Scalar]:
        """AdamW's learning rate keeps its share of the group's."""
        lr = group["lr"] if plan.parts.subspace is not None else group["lr"] * group["adamw_share"]
        return lr * plan.parts.rule.correction(plan.state["step"], group), self.kept_by_decay(lr, group)


def ratio(part: Scalar, whole: Scalar) -> float:
    """part / whole, 1 where both are zero or cannot be compared."""
    return float(part) / float(whole) if float(whole) > 0 else 1.0
