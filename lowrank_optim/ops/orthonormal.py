"""Orthonormal bases of the dominant row space of a matrix, without a full SVD."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowrank_optim.ops.project import project
from lowrank_optim.ops.two_sided import largest_entry


def orthonormalize(matrix: Tensor) -> Tensor:
    """Q of the QR factorisation whose R has a positive diagonal, (..., d, rank): columns keep order and direction.

    By the Cholesky factor of the Gram matrix, all products; a second time where the columns are not yet orthonormal to
    8 eps (a condition above 10), and by Householder reflections where it cannot be trusted (above 1e3 in fp32). Each
    matrix of a batch goes its own way. Reads one number a matrix from the device, all at once.

    Source: Yamamoto et al. 2015 (CholeskyQR2, ETNA 44).

    Args:
        matrix: (..., d, rank), rank <= d, fp32 or wider.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    basis = matrix @ _inverse_factor(matrix.mH @ matrix, one)
    gram = basis.mH @ basis
    error = (gram - one).abs().amax((-2, -1))
    # Reflections themselves come to 5 to 10 eps.
    tight = 8 * torch.finfo(gram.dtype).eps
    errors = error.reshape(-1).tolist()
    if any(tight <= found < 0.1 for found in errors):
        again = basis @ _inverse_factor(gram, one)
        basis = torch.where((error < tight)[..., None, None], basis, again)
    # Not below for the NaN that comes of a Gram matrix which is not positive definite in its precision.
    if not all(found < 0.1 for found in errors):
        untrusted = ~(error < 0.1)
        basis[untrusted] = _reflected(matrix[untrusted])
    return basis


def orthonormalize_blind(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`orthonormalize` without a look at the device: always twice, and never by reflections.

    Returns:
        Q, and whether it can be trusted, bool (..., 1, 1): orthonormal, hence finite.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(2):
        matrix = matrix @ _inverse_factor(matrix.mH @ matrix, one)
    error = (matrix.mH @ matrix - one).abs().amax((-2, -1), keepdim=True)
    # In fp32 a thousandth is a hundred times what two passes leave where they converge.
    return matrix, error < 1e-3


def _reflected(matrix: Tensor) -> Tensor:
    """The same by Householder reflections."""
    reflections, scales = torch.geqrf(matrix)
    diagonal = reflections.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal.sgn())
    return torch.linalg.householder_product(reflections, scales) * signs.unsqueeze(-2)


def _inverse_factor(gram: Tensor, one: Tensor) -> Tensor:
    """The inverse of R in Rᴴ R = ``gram``."""
    lower = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(lower, one, upper=False).mH


class Sums(Protocol):
    """What is asked of other processes where every one has some rows of the matrices."""

    @property
    def size(self) -> int:
        """The number of all rows."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""

    def max_(self, tensor: Tensor) -> Tensor:
        """The maximum over all processes, in place."""

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """The rows of this process of a tensor that has all of them."""

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """All rows."""


def normalize_(tensor: Tensor, sums: Sums | None = None) -> None:
    """Divide each matrix by its largest entry, so that products of 1e-20 or 1e20 neither under- nor overflow."""
    largest = largest_entry(tensor)
    tensor.div_(largest if sums is None else sums.max_(largest))


def sketch_again(tall: Tensor, start: Tensor, sums: Sums | None = None) -> Tensor:
    """Aᴴ A Q up to a factor, (..., d, rank), in fp32 or wider; arguments as for :func:`subspace_iteration`."""
    sketch = project(tall, start)
    normalize_(sketch, sums)
    return _over_rows(project(tall.mH, sketch), sums)


def subspace_iteration(tall: Tensor, start: Tensor, *, iterations: int = 1, sums: Sums | None = None) -> Tensor:
    """Turn ``start`` towards the dominant right-singular subspace of a matrix: Q <- qr(Aᴴ A Q).

    One iteration from a basis that is already close costs about as much as two optimizer steps.
    The columns keep their order and sign as far as the subspace stands still.

    Args:
        tall: A, shape (..., rows, d).
        start: Q, shape (..., d, rank), in the dtype of A or wider; need not be orthonormal.
        sums: where A is some rows of the whole.

    Returns:
        Orthonormal (..., d, rank).
    """
    basis = start
    for _ in range(iterations):
        basis = orthonormalize(sketch_again(tall, basis, sums))
    return basis


def _over_rows(product: Tensor, sums: Sums | None) -> Tensor:
    return product if sums is None else sums.sum_(product)


def range_finder(
    tall: Tensor, rank: int, generator: torch.Generator, *, iterations: int = 2, sums: Sums | None = None
) -> Tensor:
    """The dominant right-singular vectors of a matrix from a Gaussian sketch.

    Source: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, with an
    oversampling of rank/8 + 8 columns.

    Args:
        tall: A, shape (..., rows, d).
        rank: columns of the result, at most d.
        generator: a CPU generator, so that every device draws the same sketch; all matrices of a batch share it.
        iterations: power iterations; 0 is the plain range finder.
        sums: where A is some rows of the whole.

    Returns:
        Orthonormal (..., d, rank), dominant directions first; not finite for a matrix that is not.
    """
    d = tall.shape[-1]
    rows = tall.shape[-2] if sums is None else sums.size
    columns = min(d, rank + rank // 8 + 8)
    wide = torch.promote_types(tall.dtype, torch.float32)
    sketch = torch.randn(rows, columns, generator=generator, dtype=wide.to_real(), device="cpu")
    if sums is not None:
        sketch = sums.take(sketch, 0)
    sketch = sketch.to(device=tall.device, dtype=wide).expand(*tall.shape[:-2], *sketch.shape)
    start = _over_rows(project(tall.mH, sketch), sums)
    basis = subspace_iteration(tall, orthonormalize(start), iterations=iterations, sums=sums)
    low = project(tall, basis)
    normalize_(low, sums)
    gram = _over_rows(low.mH @ low, sums)
    # Which would not converge, for the whole batch.
    broken = ~gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    _, vectors = torch.linalg.eigh(gram.masked_fill_(broken, 0))
    vectors = vectors[..., -rank:].flip(-1)
    # They come with any sign, which the last bit of a sum may turn: a moment or a rounded basis would see it.
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return basis @ (vectors * largest.sgn().conj())
