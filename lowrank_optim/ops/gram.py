"""The symmetric product of a matrix with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import as_batch


def gram(x: Tensor, addend: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha xᴴ x + beta addend, (..., columns, columns), of each matrix of a batch.

    Args:
        x: (..., rows, columns); a symmetric matrix gives its square.
        addend: (..., columns, columns), Hermitian, or None for zero.
    """
    if addend is None:
        return (x.mH @ x).mul_(alpha)
    if x.ndim == 2:
        return torch.addmm(addend, x.mH, x, beta=beta, alpha=alpha)
    x, flat = as_batch("x", x), as_batch("addend", addend)
    return torch.baddbmm(flat, x.mH, x, beta=beta, alpha=alpha).view(addend.shape)
