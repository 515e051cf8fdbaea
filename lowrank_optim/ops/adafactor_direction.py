"""Adafactor's factored second moment and direction on a low-rank (or full) gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def adafactor_direction(
    low: Tensor, row: Tensor, col: Tensor, *, weight: float | Tensor, eps: float, clip_threshold: float,
    per_matrix: bool = False,
) -> Tensor:  # fmt: skip
    """Update both factors of the second moment in place and return Adafactor's clipped direction.

        row = (1 - weight) row + weight mean_j(|R|² + eps)
        col = (1 - weight) col + weight mean_i(|R|² + eps)
        U   = R / sqrt(row col / mean(row))
        U   = U / max(1, RMS(U) / clip_threshold)

    Args:
        low: R, shape (..., rows, columns), fp32 or wider, real or complex.
        row: shape (..., rows), real (modified in place).
        col: shape (..., columns), real (modified in place).
        weight: of the new gradient in the averages, in (0, 1].
        clip_threshold: largest root mean square of U.
        per_matrix: clip each (rows, columns) of R for itself, instead of all together.

    Returns:
        U, a new tensor like R.
    """
    square = square_of(low)
    row.lerp_(square.mean(-1).add_(eps), weight)
    col.lerp_(square.mean(-2).add_(eps), weight)
    rows = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return clip_rms_(low * rows * col.rsqrt().unsqueeze(-2), clip_threshold, per_matrix=per_matrix)


def square_of(low: Tensor) -> Tensor:
    """|R|², a new real tensor."""
    return (low * low.conj()).real if low.is_complex() else low.square()


def clip_rms_(direction: Tensor, threshold: float, *, per_matrix: bool = False) -> Tensor:
    """Scale a direction, or each matrix of it, in place so that its root mean square is at most ``threshold``."""
    return direction.div_((root_mean_square(direction, per_matrix=per_matrix) / threshold).clamp_(min=1.0))


def root_mean_square(tensor: Tensor, *, per_matrix: bool = False) -> Tensor:
    """||X||_F / sqrt(elements), in fp32 or wider, a scalar on the tensor's device, or (..., 1, 1) of each matrix."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if per_matrix:
        norm = torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True, dtype=dtype)
        return norm / (tensor.shape[-2] * tensor.shape[-1]) ** 0.5
    return torch.linalg.vector_norm(tensor, dtype=dtype) / tensor.numel() ** 0.5
