"""Means over blocks of neighbouring columns, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(matrix: Tensor, size: int) -> Tensor:
    """Means of ``size`` values of the last axis, the last one of what there is: (..., n) to (..., ceil(n / size))."""
    whole = matrix.shape[-1] // size * size
    folded = torch.unflatten(matrix[..., :whole], -1, (whole // size, size)).mean(-1)
    if whole == matrix.shape[-1]:
        return folded
    return torch.cat((folded, matrix[..., whole:].mean(-1, keepdim=True)), -1)


def unfold(folded: Tensor, size: int, columns: int) -> Tensor:
    """Every value ``size`` times, cut off at ``columns``: the inverse of :func:`fold` where blocks are constant."""
    return folded.repeat_interleave(size, -1)[..., :columns]
