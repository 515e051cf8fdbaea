"""Subspaces spanned by columns of one fixed orthogonal basis: the state holds their numbers only."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.chunks import chunks, column_norms
from lowrank_optim.ops.dct import add_dct2_, add_dct3_, dct_matrix
from lowrank_optim.ops.dct_select import dct_select, greatest
from lowrank_optim.ops.orthonormal import orthonormalize
from lowrank_optim.ops.project import project
from lowrank_optim.optim.options import flag, one_of
from lowrank_optim.optim.parts import Accumulation, Group, Option, Refresh, Scalar, Slot, Slots, State, View, Which
from lowrank_optim.optim.subspaces.oriented import Oriented, keep_where
from lowrank_optim.optim.subspaces.random import add_to_columns_, pick_columns, predecessors, sketch_matrix
from lowrank_optim.optim.validation import check_choice

TRANSFORMS = {"dct2": add_dct2_, "dct3": add_dct3_}
BASES = (*TRANSFORMS, "identity", "random")
SIMILARITIES = ("auto", "matmul", "fft")
ELL_NORMS = (1, 2)

# The size from which similarity="auto" takes the FFT. Milliseconds of FFT and product on two cores of an EPYC (fp32,
# MKL, torch 2.13, square): 0.20 and 0.18 at 256, 0.28 and 0.34 at 320, 0.42 and 1.33 at 512; on one, 0.22 and 0.34 at
# 256.
FFT_FROM = {"cpu": 320}
# Not measured: where the 51 bytes an element that the FFT moves (counted at 4096) at full bandwidth take as long as a
# bf16 product on tensor cores, by the data sheet of an H100.
FFT_FROM_ELSEWHERE = 6000


# A dict, because torch.compile reads one; it would trace through functools.cache and build a basis in every step.
BUILT: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}


def basis_rows(basis: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthogonal basis (size, size), a basis vector a row; one for the whole process.

    It is the same on every device and in every run, so that checkpoints need not hold it; ``BUILT.clear()`` frees the
    memory.
    """
    key = (basis, size, dtype, device)
    if device.type == "meta":
        return torch.empty(size, size, dtype=dtype, device=device)
    if key not in BUILT:
        BUILT[key] = _exact_rows(basis, size).to(device=device, dtype=dtype)
    return BUILT[key]


def _exact_rows(basis: str, size: int) -> Tensor:
    """The basis in fp64, made on the CPU."""
    if basis == "random":
        generator = torch.Generator(device="cpu").manual_seed(size)
        # With a positive diagonal the factorisation is unique: no LAPACK has signs of its own.
        drawn = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
        return orthonormalize(drawn).mT.contiguous()
    if basis == "identity":
        return torch.eye(size, dtype=torch.float64, device="cpu")
    return dct_matrix(size) if basis == "dct2" else dct_matrix(size).mT.contiguous()


def uses_fft(basis: str, similarity: str, size: int, device: torch.device) -> bool:
    """Whether coefficients come from an FFT rather than from a product with the basis."""
    if similarity == "auto":
        return basis in TRANSFORMS and size >= FFT_FROM.get(device.type, FFT_FROM_ELSEWHERE)
    return similarity == "fft"


def add_coefficients_(out: Tensor, tall: Tensor, basis: str, similarity: str) -> None:
    """out += the coefficients of every row of ``tall`` (..., rows, d), without a temporary of that size."""
    if tall.ndim > 2:
        for one, matrix in zip(out, tall):
            add_coefficients_(one, matrix, basis, similarity)
        return
    size = tall.shape[1]
    if basis == "identity":
        out.add_(tall)
    elif uses_fft(basis, similarity, size, tall.device):
        add_transform_ = TRANSFORMS[basis]
        for part, some in chunks(out, tall):
            add_transform_(part, some)
    else:
        # In float16 the coefficients of a finite gradient may overflow.
        dtype = out.dtype if tall.dtype == torch.float16 else tall.dtype
        rows = basis_rows(basis, size, dtype, tall.device)
        if out.dtype == tall.dtype:
            out.addmm_(tall, rows.mT)
        else:
            for part, some in chunks(out, tall):
                part.add_(some.to(dtype) @ rows.mT)


def coefficients(tall: Tensor, basis: str, similarity: str) -> Tensor:
    """The coefficients (..., rows, d) of every row of ``tall`` in the basis, in fp32 or wider."""
    out = torch.zeros(tall.shape, dtype=torch.promote_types(tall.dtype, torch.float32), device=tall.device)
    add_coefficients_(out, tall, basis, similarity)
    return out


class Settings(NamedTuple):
    """What a subspace of columns does; see the options of :class:`Columns`."""

    basis: str
    ell_norm: int
    similarity: str
    rotate: bool


class ColumnSketch(Accumulation):
    """Z G with a Gaussian Z of ``rank`` rows; |Z s|² of a column s is rank |s|² (1 ± sqrt(2 / rank)).

    A product with few random rows keeps 2-norms of columns, not 1-norms.
    """

    def works(self, group: Group) -> bool:
        return bool(group["ell_norm"] == 2)

    def sketch(self, subspace: Columns, grad: Tensor, state: State, group: Group) -> Tensor:
        return project(sketch_matrix((*grad.shape[:-2], state["rank"], grad.shape[-2]), grad, state, group), grad)

    def refresh(
        self, subspace: Columns, low: Tensor, sketch: Tensor | None, state: State, group: Group, which: Which,
        dtype: torch.dtype,
    ) -> Refresh:  # fmt: skip
        if sketch is None:
            return Refresh(renewed=False)
        # In the dtype of the basis that is there already; float16 has not the range.
        values = sketch if dtype == torch.float16 else sketch.to(dtype)
        return subspace.select(subspace.transform(values, group), state, group, which)


class Columns(Oriented):
    """``rank`` columns D_I of an orthogonal basis D on the smaller side of a matrix: low = tall @ D_I."""

    accumulation: ClassVar[Accumulation | None] = ColumnSketch()
    orthonormal = True
    splits = frozenset({"rows"})
    refreshes_rows = True
    options = {
        "basis": Option(one_of(*BASES), "dct2"),
        "ell_norm": Option(one_of(*ELL_NORMS), 2),
        "similarity": Option(one_of(*SIMILARITIES), "auto"),
        "rotate": Option(flag, True),
    }

    def check(self, group: Group) -> None:
        if group["similarity"] == "fft":
            check_choice("basis", group["basis"], TRANSFORMS)

    def slots(self, view: View, group: Group) -> Slots:
        indices = Slot((*view.batch, self.rank(view.shape, group)), torch.int64)
        return {**super().slots(view, group), "indices": indices}

    def settings(self, group: Group) -> Settings:
        """Basis, norm of the scores, way to compute coefficients, and whether moments follow their columns."""
        return Settings(group["basis"], group["ell_norm"], group["similarity"], group["rotate"])

    def sees_all(self, group: Group) -> bool:
        """A transform spreads a NaN over its row; the identity leaves it in a column that may not be selected."""
        return self.settings(group).basis != "identity"

    def transform(self, grad: Tensor, group: Group) -> Tensor:
        """The coefficients of a gradient."""
        basis, _, similarity, _ = self.settings(group)
        return coefficients(grad, basis, similarity)

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Select the columns in which this gradient is largest."""
        return self.select(self.transform(grad, group), state, group, which)

    def select(self, scored: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Select the largest columns of coefficients; with ``rotate`` the moments follow those that stay."""
        settings = self.settings(group)
        old: Tensor = state["indices"]
        if which.sums is None:
            new = pick(dct_select, group["backend"], scored.device)(scored, state["rank"], ell_norm=settings.ell_norm)
        else:
            new = greatest(which.sums.sum_(column_norms(scored, settings.ell_norm)), state["rank"])
        new = keep_where(which.usable, new, old)
        # Dᵀ D = 1: where a column was before says all that a product of the bases would.
        overlap = None
        if settings.rotate and which.warm is not False:
            overlap = predecessors(old, new, scored.shape[-1])
        old.copy_(new)
        return Refresh(renewed=True, overlap=overlap)

    def makes_basis(self, group: Group) -> bool:
        """It is gathered, unless projecting is."""
        return self.settings(group).basis != "identity"

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """(..., d, rank), the selected basis vectors."""
        rows = basis_rows(self.settings(group).basis, like.shape[-1], like.dtype, like.device)
        indices: Tensor = state["indices"]
        return (rows.index_select(0, indices) if indices.ndim == 1 else rows[indices]).mT

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, rank)."""
        if self.settings(group).basis == "identity":
            return pick_columns(grad, state["indices"])
        return super().project(grad, state, group)

    def project_back_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """target += alpha * project_back(low)."""
        if self.settings(group).basis == "identity":
            add_to_columns_(target, state["indices"], low, alpha)
        else:
            super().project_back_(target, low, state, group, alpha=alpha)


class Coefficients(Columns):
    """The same for a gradient that the lift has transformed already: projecting is picking columns."""

    accumulation = None

    def transform(self, grad: Tensor, group: Group) -> Tensor:
        """The gradient, which holds them."""
        return grad

    def makes_basis(self, group: Group) -> bool:
        """Projecting takes none."""
        return False

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, rank), a gather."""
        return pick_columns(grad, state["indices"])
