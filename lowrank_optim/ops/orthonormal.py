"""Orthonormal bases of the dominant row space of a matrix, without a full SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalize(matrix: Tensor) -> Tensor:
    """The Q of QR = A with a positive diagonal of R, which keeps the columns' direction: LAPACK leaves the signs open.

    Args:
        matrix: A, shape (rows, columns), rows >= columns, fp32 or wider.
    """
    basis, upper = torch.linalg.qr(matrix)
    diagonal = upper.diagonal()
    return basis * torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal.sgn())


def subspace_iteration(tall: Tensor, start: Tensor, *, iterations: int = 1) -> Tensor:
    """Turn ``start`` towards the dominant right-singular subspace of a matrix: Q <- qr(Aᴴ A Q).

    One iteration from a basis that is already close costs about as much as two optimizer steps.
    The columns keep their order and sign as far as the subspace stands still.

    Args:
        tall: A, shape (rows, d), fp32 or wider.
        start: Q, shape (d, rank); need not be orthonormal.

    Returns:
        An orthonormal (d, rank) matrix.
    """
    basis = start
    for _ in range(iterations):
        sketch = tall @ basis
        # Both products scale with A: dividing keeps A'A from under- or overflowing at |A| ~ 1e-20 or 1e20.
        sketch = sketch / sketch.abs().amax().clamp_min(torch.finfo(sketch.dtype).tiny)
        basis = orthonormalize(tall.mH @ sketch)
    return basis


def range_finder(tall: Tensor, rank: int, generator: torch.Generator, *, iterations: int = 2) -> Tensor:
    """The dominant right-singular vectors of a matrix from a Gaussian sketch.

    Source: Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, with an
    oversampling of rank/8 + 8 columns.

    Args:
        tall: A, shape (rows, d), fp32 or wider.
        rank: columns of the result, at most d.
        generator: a CPU generator, so that every device draws the same sketch.
        iterations: power iterations; 0 is the plain range finder.

    Returns:
        An orthonormal (d, rank) matrix, dominant directions first.
    """
    d = tall.shape[1]
    columns = min(d, rank + rank // 8 + 8)
    sketch = torch.randn(tall.shape[0], columns, generator=generator, dtype=tall.real.dtype)
    start = tall.mH @ sketch.to(device=tall.device, dtype=tall.dtype)
    basis = subspace_iteration(tall, torch.linalg.qr(start).Q, iterations=iterations)
    low = tall @ basis
    low = low / low.abs().amax().clamp_min(torch.finfo(low.dtype).tiny)
    _, vectors = torch.linalg.eigh(low.mH @ low)
    return basis @ vectors[:, -rank:].flip(-1)
