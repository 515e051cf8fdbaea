"""The low-rank image of a gradient and the norms of its rows, of one reading."""

from __future__ import annotations

import torch
from torch import Tensor


def project(grad: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """R = G P and the norm of every row of G.

    Args:
        grad: G (..., rows, d), real, of any strides.
        basis: P (..., d, rank), dtype of G.

    Returns:
        R (..., rows, rank) and the norms (..., rows, 1), both in fp32, or fp64 for fp64.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    norms = torch.linalg.vector_norm(grad, dim=-1, keepdim=True, dtype=wide)
    return grad.to(wide) @ basis.to(wide), norms
