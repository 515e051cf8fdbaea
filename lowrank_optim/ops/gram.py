"""The symmetric product of a matrix with itself."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(x: Tensor, addend: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha xᴴ x + beta addend, (columns, columns).

    Args:
        x: (rows, columns); a symmetric matrix gives its square.
        addend: (columns, columns), Hermitian, or None for zero.
    """
    if addend is None:
        return (x.mH @ x).mul_(alpha)
    return torch.addmm(addend, x.mH, x, beta=beta, alpha=alpha)
