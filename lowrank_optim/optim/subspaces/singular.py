"""The dominant singular subspace of the gradient on one side of a matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import (
    orthonormalize,
    orthonormalize_blind,
    range_finder,
    sketch_again,
    subspace_iteration,
)
from lowrank_optim.ops.project import project
from lowrank_optim.optim import finite
from lowrank_optim.optim.options import one_of
from lowrank_optim.optim.parts import Accumulation, Group, Option, Refresh, Slot, Slots, State, View, Which
from lowrank_optim.optim.subspaces.oriented import SIDES, Oriented, Stored, keep_where, on_left, overlap_where
from lowrank_optim.optim.subspaces.random import MOMENTS, sketch_matrix

REFRESHES = ("power", "randomized", "svd")
SELECTIONS = ("top", "spectral")


def draw_spectral(singular_values: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """``rank`` distinct indices, ascending, drawn half uniformly and half in proportion to the singular values.

    Source: Zhao et al. 2024, Sparse Spectral Training (arXiv 2405.15481).

    Args:
        singular_values: (..., q), not all zero.
        rank: at most q.
        generator: a CPU generator.

    Returns:
        int64 (..., rank), on the CPU.
    """
    weights = singular_values.double().cpu()
    q = weights.shape[-1]
    share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    drawn = torch.multinomial((0.5 / q + 0.5 * share).view(-1, q), rank, generator=generator)
    return drawn.sort(-1).values.view(*weights.shape[:-1], rank)


def top_basis(
    tall: Tensor, rank: int, refresh: str, state: State, *, left: bool, which: Which, start: Tensor | None = None,
    selection: str = "top",
) -> Tensor | None:  # fmt: skip
    """The ``rank`` dominant right-singular vectors of oriented gradients, None where all attempts failed.

    With ``selection="spectral"`` the singular vectors are drawn instead.

    Args:
        tall: (..., rows, d), the side to compress last.
        refresh: "power", "randomized" or "svd".
        left: whether ``tall`` is the transpose of the gradient. The SVD is taken of the gradient as it is, which
            makes the signs those of the published code.
        which: matrices of the batch; what is not usable may come out as anything.
        start: the previous basis (..., d, rank), for "power".
    """
    sums = which.sums
    if refresh == "svd":
        if sums is not None:
            tall, sums = sums.gather(tall, tall.ndim - 2), None
        tall = tall.to(torch.promote_types(tall.dtype, torch.float32))
    basis: Tensor | None = None
    generator = torch.Generator(device="cpu")
    seed = state["seed"] * 1_000_003 + 2 * int(state["step"])
    if refresh == "svd":
        basis = _svd_basis(tall, rank, left, selection, generator.manual_seed(seed))
    elif refresh == "power" and start is not None and which.warm is not False:
        basis = subspace_iteration(tall, start, sums=sums)
        if isinstance(which.warm, Tensor):
            basis = keep_where(which.warm, basis, range_finder(tall, rank, generator.manual_seed(seed), sums=sums))
    for attempt in range(2):
        if basis is not None and usable(basis, which):
            return basis
        try:
            basis = range_finder(tall, rank, generator.manual_seed(seed + attempt), sums=sums)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            basis = None
    return basis if basis is not None and usable(basis, which) else None


def _svd_basis(grad: Tensor, rank: int, left: bool, selection: str, generator: torch.Generator) -> Tensor | None:
    try:
        # No copy of the gradient: LAPACK's input is overwritten in torch's own buffer.
        matrix = grad.mT if left else grad
        # An unfolded convolution may have fewer rows than the basis has columns.
        u, singular_values, vh = torch.linalg.svd(matrix, full_matrices=min(matrix.shape[-2:]) < rank)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    vectors = u.conj() if left else vh.mH
    if selection == "top":
        return vectors[..., :rank]
    drawn = draw_spectral(singular_values, rank, generator).to(vectors.device)
    return vectors.gather(-1, drawn.unsqueeze(-2).expand(*vectors.shape[:-1], rank))


def usable(basis: Tensor, which: Which) -> bool:
    """Whether the bases of all usable matrices are finite; reads one value from the device."""
    sums = basis.sum((-2, -1), keepdim=True).isfinite()
    return bool((sums if which.usable is None else sums | ~which.usable).all())


class HalfIterations(Accumulation):
    """Half a subspace iteration an update: Q = qr(G P) is put aside; at the next update P = qr(Gᴴ Q).

    ``refresh="randomized"`` takes a Gaussian matrix in place of P. An SVD takes the whole gradient.
    """

    def works(self, group: Group) -> bool:
        return bool(group["refresh"] != "svd")

    def slots(self, subspace: Oriented, view: View, group: Group) -> Slots:
        return {"pending": Slot(subspace.low_shape(view, group), view.dtype, subspace.sides(view, group)[2], late=True)}

    def sketch(self, subspace: Oriented, grad: Tensor, state: State, group: Group) -> Tensor | None:
        if "pending" in state:
            return project(grad.mH, state["pending"].to(grad.dtype))
        if group["refresh"] == "power":
            return None
        return project(grad, sketch_matrix((*grad.shape[:-2], grad.shape[-1], state["rank"]), grad, state, group))

    def refresh(
        self, subspace: Oriented, low: Tensor, sketch: Tensor | None, state: State, group: Group, which: Which,
        dtype: torch.dtype,
    ) -> Refresh:  # fmt: skip
        image = orthonormalize(low if sketch is None else sketch)
        if not usable(image, which):
            state.pop("pending", None)
            return Refresh(renewed=False)
        if "pending" not in state:
            state["pending"] = image.to(dtype)
            return Refresh(renewed=False)
        assert isinstance(subspace, TopSingular)
        return subspace.replace_basis_(image, state, group, which)


class TopSingular(Stored):
    """The dominant singular subspace on one side of a matrix.

    ``std`` compresses the smaller side, ``reverse_std`` the larger one, ``left`` the rows, ``right`` the columns.
    """

    accumulation: ClassVar[Accumulation | None] = HalfIterations()
    by_columns = True
    orthonormal = True
    splits = frozenset({"rows", "columns"})
    refreshes_rows = True
    options = {
        "proj_type": Option(one_of(*SIDES), "std"),
        "refresh": Option(one_of(*REFRESHES), "power"),
        "selection": Option(one_of(*SELECTIONS), "top"),
        "moments": Option(one_of(*MOMENTS), "keep"),
    }

    def check(self, group: Group) -> None:
        if group["selection"] == "spectral" and group["refresh"] != "svd":
            raise ValueError(f"Invalid refresh: {group['refresh']!r}, selection='spectral' works with 'svd' only")

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        return on_left(shape, group["proj_type"])

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Replace the basis by the dominant directions of this gradient.

        Where the host does not look, the usual case does without a look too: whether it went well is on the device.
        """
        start = self.basis(grad, state, group)
        if group["refresh"] == "power" and which.warm is True and not finite.host_looks(grad.device):
            turned, trusted = orthonormalize_blind(sketch_again(grad, start, which.sums))
            result = self.replace_basis_(torch.where(trusted, turned, start), state, group, which)
            return result._replace(renewed=trusted if which.usable is None else trusted | ~which.usable)
        basis = top_basis(
            grad, state["rank"], group["refresh"], state, left=bool(state["left"]), which=which, start=start,
            selection=group["selection"],
        )  # fmt: skip
        if basis is None:
            return Refresh(renewed=False)
        return self.replace_basis_(basis, state, group, which)

    def replace_basis_(self, basis: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Switch to ``basis``; move the moments as the ``moments`` option asks."""
        state.pop("pending", None)
        old = self.basis(basis, state, group)
        basis = keep_where(which.usable, basis, old)
        overlap = None
        if group["moments"] != "keep" and which.warm is not False:
            overlap = overlap_where(which.usable, old.mH @ basis)
            if group["moments"] == "align":
                # A new column that is orthogonal to its predecessor keeps the sign that it came with.
                turn = overlap.diagonal(dim1=-2, dim2=-1).conj().sgn()
                basis = basis * torch.where(turn == 0, torch.ones_like(turn), turn).unsqueeze(-2)
                overlap = None
        self.keep_basis_(basis, state, group)
        return Refresh(renewed=True, overlap=overlap)

    def keep_basis_(self, basis: Tensor, state: State, group: Group) -> None:
        """Overwrite the basis that is kept."""
        state["basis"].copy_(basis)
