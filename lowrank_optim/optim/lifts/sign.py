"""Signs of the part of a gradient that the subspace leaves out (FRUGAL)."""

from __future__ import annotations

from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import number
from lowrank_optim.optim.parts import Group, Lift, Option, State, Step, Update


class SignOutside(Lift):
    """W += size (project_back(N) + inactive_lr_scale sgn(G - project_back(R))).

    A sign has no factored form, so the residual is a matrix here, and the whole update is collected in it.
    """

    reads_low = True
    splits = frozenset({"rows"})
    options = {"inactive_lr_scale": Option(number(), 1.0)}

    def update(self, step: Step, state: State, group: Group) -> Update:
        update = zero_unless(step.ok, step.grad)
        update = step.grad.clone() if update is step.grad else update
        step.subspace.project_back_(update, step.low, state, group, alpha=-1.0)
        update.sgn_().mul_(group["inactive_lr_scale"])
        step.subspace.project_back_(update, step.direction, state, group, alpha=1.0)
        return Update(full=update)
