"""Scales of rows and columns from the squares of a matrix, of which nothing but vectors is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import chunks

# Below this share of the largest entry a row or column counts as zero: in fp32 its squares are.
NOTHING = 1e-37
# The largest scale, far enough from overflow to be multiplied with a learning rate.
LARGEST = 1e37


def largest_entry(matrix: Tensor) -> Tensor:
    """The largest entry, real or imaginary part, of every matrix, (..., 1, 1), in fp32 or wider, and above zero."""
    entries = torch.view_as_real(matrix) if matrix.is_complex() else matrix
    axes = (-3, -2, -1) if matrix.is_complex() else (-2, -1)
    if matrix.numel():
        # Unlike abs(), these make no copy.
        found = torch.maximum(entries.amax(axes), -entries.amin(axes))
    else:
        found = entries.new_zeros(matrix.shape[:-2])
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return found.clamp_min(torch.finfo(found.dtype).tiny)[..., None, None]


def row_column_pass(
    matrix: Tensor, unit: Tensor, columns: Tensor, weigh: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """r = weigh(P c) and rᵀ P in one pass over a matrix, with P = |matrix / unit|² by element.

    Args:
        matrix: (..., m, n).
        unit: (..., 1, 1), such that squares neither under- nor overflow.
        columns: c (..., 1, n).
        weigh: acts on every row for itself, (..., some, 1).

    Returns:
        r (..., m, 1) and rᵀ P (..., 1, n).
    """
    rows, sums = columns.new_empty((*matrix.shape[:-1], 1)), torch.zeros_like(columns)
    for part, weights in chunks(matrix, rows):
        squares = (part.abs() if part.is_complex() else part).div(unit).square_()
        weights.copy_(weigh(squares @ columns.mT))
        sums += weights.mT @ squares
    return rows, sums


def sinkhorn_scales(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Scales a (..., m, 1) and b (..., 1, n) of the square-root Sinkhorn iteration, rows first::

        a_i = sqrt(n / sum_j G_ij² b_j²);  b_j = sqrt(m / sum_i a_i² G_ij²)         # ``iterations`` times, from b = 1

    Then all rows of diag(a) G diag(b) have the norm sqrt(n) and all columns, exactly, sqrt(m). Zero rows and columns
    get zeros, and so does everything if an entry is not finite.

    Args:
        matrix: G (..., m, n).
    """
    m, n = matrix.shape[-2:]
    unit = largest_entry(matrix)
    squares = unit.new_ones(*matrix.shape[:-2], 1, n)
    rows = squares
    for _ in range(iterations):
        rows, sums = row_column_pass(matrix, unit, squares, lambda sums: _quotient(n, sums))
        squares = _quotient(m, sums)
    return rows.sqrt().div(unit).clamp_max(LARGEST), squares.sqrt()


def _quotient(size: int, sums: Tensor) -> Tensor:
    return torch.where(sums > size * NOTHING, size / sums, 0)


def rank_one_fit(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """q (..., m, 1) and s (..., 1, n) by power iteration on P = |G|² by element, so that q sᵀ approximates P::

        s = Pᵀ q / |q|²;  q = P s / |s|²                                            # ``iterations`` times, from q = 1

    s has the scale of the squares, q none. Zeros for a matrix of zeros; NaN where an entry is not finite.

    Args:
        matrix: G (..., m, n).
        iterations: at least 1.
    """
    m, n = matrix.shape[-2:]
    unit = largest_entry(matrix)
    rows, sums = row_column_pass(matrix, unit, unit.new_zeros(*matrix.shape[:-2], 1, n), torch.ones_like)
    columns = sums / m
    for i in range(iterations):
        if i:
            columns = sums / _square_norm(rows)
        rows, sums = row_column_pass(matrix, unit, columns / _square_norm(columns), lambda sums: sums)
    return rows, columns * unit * unit


def _square_norm(vector: Tensor) -> Tensor:
    square = vector.square().sum((-2, -1), keepdim=True)
    return square.clamp_min(torch.finfo(square.dtype).tiny)


def scaled_norm(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """||diag(rows) G diag(columns)|| of every matrix G (..., m, n), (..., 1, 1)."""
    unit = largest_entry(matrix)
    sums, _ = row_column_pass(matrix, unit, (columns * unit).square(), lambda sums: sums)
    return (rows.square() * sums).sum(-2, keepdim=True).sqrt()
