"""The dominant singular subspaces of several axes of a tensor at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.optim.options import one_of
from lowrank_optim.optim.parts import Group, Number, Option, Refresh, Scalar, Slot, Slots, State, Subspace, View, Which
from lowrank_optim.optim.subspaces.oriented import keep_where
from lowrank_optim.optim.subspaces.singular import REFRESHES, top_basis


def along_axis(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply ``matrix`` (..., k, d) into one axis (of length d) of a tensor; the axis becomes k long."""
    if matrix.ndim > 2 or tensor.ndim == 2:
        return matrix @ tensor if axis == tensor.ndim - 2 else tensor @ matrix.mT
    return torch.tensordot(tensor, matrix, dims=([axis], [1])).movedim(-1, axis)


class Tucker(Subspace):
    """The dominant singular subspaces of several axes at once: a truncated higher-order SVD.

    Every axis longer than the rank is compressed, the others (a convolution's kernel) are left alone. For a matrix, or
    every matrix of a batch, this is ``proj_type="full"``: low = PᵀGQ. The moments stay as they are at a refresh, since
    a core is turned along every axis at once. Source: De Lathauwer, De Moor, Vandewalle 2000.
    """

    flattens = False
    factored = False
    orthonormal = True
    options = {"refresh": Option(one_of(*REFRESHES), "power")}

    def compresses(self, shape: tuple[int, ...], group: Group) -> bool:
        """Tensors of two or more dimensions with an axis longer than the rank (matrices: both)."""
        if len(shape) == 2:
            return min(shape) > group["rank"]
        return len(shape) > 2 and max(shape) > group["rank"]

    def slots(self, view: View, group: Group) -> Slots:
        rank, batch = self.rank(view.shape, group), len(view.batch)
        found: Slots = {"left": Number(False, fixed=True), "rank": Number(rank, fixed=True)}
        for axis, d in enumerate(view.shape[batch:], batch):
            if d > rank:
                along = {len(view.shape) - 2: "rows", len(view.shape) - 1: "columns"}.get(axis)
                found[f"basis.{axis}"] = Slot((*view.shape[:batch], d, rank), view.dtype, along)
        return found

    def low_shape(self, view: View, group: Group) -> tuple[int, ...]:
        """The shape of the core."""
        batch = len(view.batch)
        return *view.shape[:batch], *(min(d, self.rank(view.shape, group)) for d in view.shape[batch:])

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The tensor itself."""
        return tensor

    def _axes(self, tensor: Tensor, state: State) -> list[int]:
        return [axis for axis in range(tensor.ndim) if f"basis.{axis}" in state]

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Replace every basis, or none."""
        bases: dict[str, Tensor] = {}
        for axis in self._axes(grad, state):
            key = f"basis.{axis}"
            batch = state[key].ndim - 2
            unfolding = grad.movedim(axis, -1).reshape(*grad.shape[:batch], -1, grad.shape[axis])
            # Of a matrix both bases come from one decomposition, that of the matrix as it is.
            basis = top_basis(
                unfolding, state["rank"], group["refresh"], state, left=axis == batch, which=which, start=state[key]
            )
            if basis is None:
                return Refresh(renewed=False)
            bases[key] = keep_where(which.usable, basis, state[key].to(basis.dtype))
        for key, basis in bases.items():
            state[key].copy_(basis)
        return Refresh(renewed=True)

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The core: every compressed axis shortened to the rank."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        for axis in self._axes(grad, state):
            grad = along_axis(grad, state[f"basis.{axis}"].to(grad.dtype).mT, axis)
        return grad

    def project_back_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """target += alpha * (low expanded along every compressed axis)."""
        low = (low * alpha).to(target.dtype)
        for axis in self._axes(target, state):
            low = along_axis(low, state[f"basis.{axis}"].conj().to(target.dtype), axis)
        target.add_(low)
