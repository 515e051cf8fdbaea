"""Subspaces spanned by columns of one fixed orthogonal basis: the state holds their numbers only."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.chunks import chunks
from lowrank_optim.ops.dct import add_dct2_, add_dct3_, dct_matrix
from lowrank_optim.ops.dct_select import dct_select
from lowrank_optim.ops.orthonormal import orthonormalize
from lowrank_optim.optim.checks import check_choice
from lowrank_optim.optim.protocols import Group, Refresh, State
from lowrank_optim.optim.sketches import sketch_matrix

TRANSFORMS = {"dct2": add_dct2_, "dct3": add_dct3_}
BASES = (*TRANSFORMS, "identity", "random")
SIMILARITIES = ("auto", "matmul", "fft")
ELL_NORMS = (1, 2)

# The size from which similarity="auto" takes the FFT. Milliseconds of FFT and product on two cores of an EPYC (fp32,
# MKL, torch 2.13, square): 0.20 and 0.18 at 256, 0.28 and 0.34 at 320, 0.42 and 1.33 at 512; on one, 0.22 and 0.34 at
# 256.
FFT_FROM = {"cpu": 320}
# Not measured: where 28 bytes an element at full bandwidth equal a bf16 product on tensor cores, by data sheets.
FFT_FROM_ELSEWHERE = 2048


# A dict, because torch.compile reads one; it would trace through functools.cache and build a basis in every step.
BUILT: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}


def basis_rows(basis: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthogonal basis (size, size), a basis vector a row; one for the whole process.

    It is the same on every device and in every run, so that checkpoints need not hold it; ``BUILT.clear()`` frees the
    memory.
    """
    key = (basis, size, dtype, device)
    if key not in BUILT:
        BUILT[key] = _exact_rows(basis, size).to(device=device, dtype=dtype)
    return BUILT[key]


def _exact_rows(basis: str, size: int) -> Tensor:
    """The basis in fp64."""
    if basis == "random":
        generator = torch.Generator().manual_seed(size)
        # With a positive diagonal the factorisation is unique: no LAPACK has signs of its own.
        return orthonormalize(torch.randn(size, size, generator=generator, dtype=torch.float64)).mT.contiguous()
    if basis == "identity":
        return torch.eye(size, dtype=torch.float64)
    return dct_matrix(size) if basis == "dct2" else dct_matrix(size).mT.contiguous()


def uses_fft(group: Group, size: int, device: torch.device) -> bool:
    """Whether coefficients come from an FFT rather than from a product with the basis."""
    if group["similarity"] == "auto":
        return group["basis"] in TRANSFORMS and size >= FFT_FROM.get(device.type, FFT_FROM_ELSEWHERE)
    return bool(group["similarity"] == "fft")


def add_coefficients_(out: Tensor, tall: Tensor, group: Group) -> None:
    """out += the coefficients of every row of ``tall`` (rows, d) in the basis, without a temporary of that size."""
    size = tall.shape[1]
    if group["basis"] == "identity":
        out.add_(tall)
    elif uses_fft(group, size, tall.device):
        add_transform_ = TRANSFORMS[group["basis"]]
        for part, some in chunks(out, tall):
            add_transform_(part, some)
    else:
        rows = basis_rows(group["basis"], size, tall.dtype, tall.device)
        if out.dtype == tall.dtype:
            out.addmm_(tall, rows.mT)
        else:
            for part, some in chunks(out, tall):
                part.add_(some @ rows.mT)


def coefficients(tall: Tensor, group: Group) -> Tensor:
    """The coefficients (rows, d) of every row of ``tall`` in the basis, in fp32 or wider."""
    out = torch.zeros(tall.shape, dtype=torch.promote_types(tall.dtype, torch.float32), device=tall.device)
    add_coefficients_(out, tall, group)
    return out


def pick_columns(coefficients: Tensor, indices: Tensor, group: Group) -> Tensor:
    """Columns of the coefficients; non-finite throughout where the gradient is so anywhere.

    A transform spreads a NaN over its row, so that the base sees it in the columns that were picked; without one it may
    stand in another.
    """
    picked = coefficients.index_select(-1, indices)
    if group["basis"] != "identity" or group["update_proj_gap"] == 1:
        return picked
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    return picked + (0 * coefficients.sum(dtype=wide)).to(picked.dtype)


class Columns:
    """``rank`` columns D_I of an orthogonal basis D on the smaller side of a matrix: low = tall @ D_I."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on an unknown basis, norm or similarity, or an FFT for a basis that has none."""
        check_choice("basis", group["basis"], BASES)
        check_choice("ell_norm", group["ell_norm"], ELL_NORMS)
        check_choice("similarity", group["similarity"], SIMILARITIES)
        if group["similarity"] == "fft":
            check_choice("basis", group["basis"], TRANSFORMS)

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        """Matrices whose smaller side exceeds the rank."""
        return len(shape) == 2 and min(shape) > group["rank"]

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left``, and ``indices`` (rank,) of columns, ascending."""
        rows, columns = param.shape
        state["left"] = rows < columns
        state["indices"] = torch.zeros(group["rank"], dtype=torch.int64, device=param.device)
        return torch.Size((self.orient(param, state).shape[0], group["rank"]))

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The view whose last axis is the compressed one."""
        return tensor.mT if state["left"] else tensor

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Select the columns in which this gradient is largest."""
        return self._renew(coefficients(grad, group), state, group)

    def sums(self, group: Group) -> bool:
        """A product with few random rows keeps 2-norms of columns, not 1-norms."""
        return bool(group["ell_norm"] == 2)

    def sketch(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Z G with a Gaussian Z of ``rank`` rows; |Z s|² of a column s is rank |s|² (1 ± sqrt(2 / rank))."""
        return sketch_matrix(group["rank"], grad.shape[0], grad, state, group) @ grad

    def refresh_from_sums(
        self, low: Tensor, sketch: Tensor | None, state: State, group: Group, *, dtype: torch.dtype
    ) -> Refresh:
        """Select the columns in which the sum of the gradients is largest, as far as the sketch tells."""
        return Refresh(renewed=False) if sketch is None else self._renew(coefficients(sketch, group), state, group)

    def _renew(self, scored: Tensor, state: State, group: Group) -> Refresh:
        select = pick(dct_select, group.get("backend"), scored.device)
        indices = select(scored, group["rank"], ell_norm=group["ell_norm"])
        overlap = None
        if group.get("rotate", False):
            # Dᵀ D = 1: where a column was before, or -1 for a new one, says all that a product would.
            place = torch.full((scored.shape[1],), -1, dtype=torch.int64, device=scored.device)
            place.index_copy_(0, state["indices"], torch.arange(group["rank"], device=scored.device))
            overlap = place[indices]
        state["indices"].copy_(indices)
        return Refresh(renewed=True, overlap=overlap)

    def _vectors(self, like: Tensor, state: State, group: Group) -> Tensor:
        """(rank, d) the selected basis vectors, one a row."""
        return basis_rows(group["basis"], like.shape[1], like.dtype, like.device)[state["indices"]]

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        if group["basis"] == "identity":
            return pick_columns(grad, state["indices"], group)
        return grad @ self._vectors(grad, state, group).mT

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """One GEMM that accumulates in the weight itself."""
        if isinstance(alpha, Tensor):
            low, alpha = low * alpha, 1.0
        low = low.to(target.dtype)
        if group["basis"] == "identity":
            target.index_add_(-1, state["indices"], low, alpha=alpha)
        else:
            target.addmm_(low, self._vectors(target, state, group), alpha=alpha)


class Coefficients(Columns):
    """The same for a gradient that the lift has transformed already: projecting is picking columns."""

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Select the largest columns of the coefficients."""
        return self._renew(grad, state, group)

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank), a gather."""
        return pick_columns(grad, state["indices"], group)


COEFFICIENTS = Coefficients()
