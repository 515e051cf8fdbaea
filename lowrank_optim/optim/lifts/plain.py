"""The lift of GaLore: the direction projected back and scaled."""

from __future__ import annotations

from lowrank_optim.optim.options import number
from lowrank_optim.optim.parts import Group, Lift, Option, State, Step, Update


class Unscaled(Lift):
    """W += size project_back(N)."""

    passes_direction = True
    splits = frozenset({"rows", "columns"})

    def reads_gradient(self, group: Group) -> bool:
        return False

    def update(self, step: Step, state: State, group: Group) -> Update:
        return Update(step.direction)


class Plain(Unscaled):
    """W += size scale project_back(N)."""

    options = {"scale": Option(number(), 0.25)}

    def update(self, step: Step, state: State, group: Group) -> Update:
        return Update(step.direction, scale=group["scale"])
