"""No subspace: a matrix as it is, for lifts that make the whole update from the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.optim.parts import Group, Rule, State, View
from lowrank_optim.optim.subspaces.oriented import Oriented


class Unprojected(Oriented):
    """Every matrix whose smaller side exceeds the rank, in its own orientation; nothing is projected."""

    refreshes = False
    follows_gradient = False

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        return False

    def low_shape(self, view: View, group: Group) -> tuple[int, ...]:
        return *view.shape[:-1], 0

    def sees_all(self, group: Group) -> bool:
        """No: nothing of the gradient is in its projection."""
        return False

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, 0)."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return grad.new_empty((*grad.shape[:-1], 0), dtype=dtype)


class Whole(Unprojected):
    """Every matrix of more than one row and column.

    The ``rank`` of a group is only the switch: None is the full-rank rule.
    """

    def compresses(self, shape: tuple[int, ...], group: Group) -> bool:
        return len(shape) >= 2 and min(shape[-2:]) > 1

    def rank(self, shape: tuple[int, ...], group: Group) -> int:
        return 0

    def describe(self, shape: tuple[int, ...], group: Group) -> str:
        return "whole"


class Unchanged(Rule):
    """The gradient is the direction, without bias correction: the lift does it all."""

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
        return low
