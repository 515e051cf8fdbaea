"""No subspace: a matrix as it is, for lifts that make the whole update from the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.optim.parts import Group, Rule, State
from lowrank_optim.optim.subspaces.oriented import Oriented


class Whole(Oriented):
    """Every matrix with more than one row and column, in its own orientation; of rank 0, so that nothing is projected.

    The ``rank`` of a group is only the switch: None is the full-rank rule.
    """

    refreshes = False
    follows_gradient = False

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        return False

    def compresses(self, shape: tuple[int, ...], group: Group) -> bool:
        return len(shape) >= 2 and min(shape[-2:]) > 1

    def rank(self, shape: tuple[int, ...], group: Group) -> int:
        return 0

    def describe(self, shape: tuple[int, ...], group: Group) -> str:
        return "whole"

    def sees_all(self, group: Group) -> bool:
        """No: nothing of the gradient is in its projection."""
        return False

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, 0)."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return grad.new_empty((*grad.shape[:-1], 0), dtype=dtype)


class Unchanged(Rule):
    """The gradient is the direction, without bias correction: the lift does it all."""

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
        return low
