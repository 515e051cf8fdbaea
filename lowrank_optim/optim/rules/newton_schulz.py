"""The direction of Muon: singular values set to about 1."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops.newton_schulz import newton_schulz
from lowrank_optim.optim.options import positive_int
from lowrank_optim.optim.parts import Group, Option, Rule, State


class NewtonSchulz(Rule):
    """The low-rank momentum with its singular values set to about 1. Without state or bias correction."""

    options = {"ns_steps": Option(positive_int, 5)}

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
        """Orthogonal to within the iteration's accuracy."""
        return newton_schulz(low, steps=group["ns_steps"], backend=group["backend"])
