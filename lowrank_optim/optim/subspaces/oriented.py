"""What subspaces on one side of a matrix share: the orientation, and the product that projects."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops.project import project
from lowrank_optim.optim.parts import Group, Number, Scalar, Slot, Slots, State, Subspace, View

SIDES = ("std", "reverse_std", "left", "right")


def on_left(shape: tuple[int, ...], proj_type: str) -> bool:
    """Whether the rows of a matrix (..., m, n) are the compressed side."""
    rows, columns = shape[-2:]
    return {"std": rows < columns, "reverse_std": rows >= columns, "left": True, "right": False}[proj_type]


class Oriented(Subspace):
    """A subspace on one side of every matrix (..., m, n), with a basis (..., d, rank) of that side.

    The parts of the state that it declares are ``left``, whether the rows are the compressed side, its length ``side``,
    and ``rank``.
    """

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        """Whether the rows are compressed; the smaller side here."""
        return on_left(shape, "std")

    def compresses(self, shape: tuple[int, ...], group: Group) -> bool:
        """Matrices whose smaller side exceeds the rank."""
        return len(shape) >= 2 and min(shape[-2:]) > self.rank(shape, group)

    def sides(self, view: View, group: Group) -> tuple[int, int, str, str]:
        """Length of the side that stays and of the compressed one, d, and along which axis of the weight each runs."""
        rows, columns = view.shape[-2:]
        if self.left(view.shape, group):
            return columns, rows, "columns", "rows"
        return rows, columns, "rows", "columns"

    def slots(self, view: View, group: Group) -> Slots:
        # A basis that is not stored, or only as numbers of columns, would not tell for which side it was made.
        numbers = {
            "left": self.left(view.shape, group),
            "side": self.sides(view, group)[1],
            "rank": self.rank(view.shape, group),
        }
        return {key: Number(value, fixed=True) for key, value in numbers.items()}

    def low_shape(self, view: View, group: Group) -> tuple[int, ...]:
        """(..., rows, rank)."""
        return *view.batch, self.sides(view, group)[0], self.rank(view.shape, group)

    def oriented_shape(self, view: View, group: Group) -> tuple[int, ...]:
        """(..., rows, d)."""
        return *view.batch, *self.sides(view, group)[:2]

    def kept_axis(self, view: View, group: Group) -> str | None:
        """The axis that is not compressed."""
        return self.sides(view, group)[2]

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The view whose last axis is the compressed one."""
        return tensor.mT if state["left"] else tensor

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, rank)."""
        return project(grad, self.basis(grad, state, group))

    def project_back_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """One product that accumulates in the target itself."""
        if isinstance(alpha, Tensor):
            low, alpha = low * alpha, 1.0
        basis = self.basis(target, state, group)
        product_ = torch.Tensor.addmm_ if target.ndim == 2 else torch.Tensor.baddbmm_
        product_(target, low.to(target.dtype), basis.mH, alpha=alpha)


class Stored(Oriented):
    """A subspace whose basis (..., d, rank) is kept in the dtype of the weight."""

    # Whether a CPU keeps it column after column, as :class:`lowrank_optim.optim.parts.Slot` explains.
    by_columns: ClassVar[bool] = False

    def slots(self, view: View, group: Group) -> Slots:
        _, d, _, along = self.sides(view, group)
        shape = (*view.batch, d, self.rank(view.shape, group))
        return {**super().slots(view, group), "basis": Slot(shape, view.dtype, along, by_columns=self.by_columns)}

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        basis: Tensor = state["basis"]
        return basis if basis.dtype == like.dtype else basis.to(like.dtype)


def overlap_where(which: Tensor | None, overlap: Tensor) -> Tensor:
    """An overlap (..., rank, rank), but the identity for those matrices that ``which`` leaves out."""
    if which is None:
        return overlap
    stays = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device).expand(overlap.shape)
    return torch.where(which, overlap, stays)


def keep_where(which: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new``, but ``old`` for those matrices of a batch that ``which`` (..., 1, 1) leaves out."""
    if which is None:
        return new
    return torch.where(which.view(which.shape[: which.ndim - 2] + (1,) * (new.ndim - which.ndim + 2)), new, old)
