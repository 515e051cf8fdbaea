"""Passes over a matrix a few rows at a time, so that nothing made on the way is of its size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Dtypes of fewer bits than arithmetic takes.
NARROW = (torch.bfloat16, torch.float16)
# Values at a time on a CPU: small enough for its cache, large enough for what a call costs.
CHUNK = 2**17


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several (..., rows, columns), in at least two parts; an eighth where every part is a launch."""
    *batch, rows, columns = tensors[0].shape
    cached = CHUNK // max(1, columns * math.prod(batch)) if tensors[0].device.type == "cpu" else rows // 8
    some = max(1, min(cached, -(-rows // 2)))
    for first in range(0, rows, some):
        yield tuple([tensor.narrow(-2, first, min(some, rows - first)) for tensor in tensors])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; where it has that, ``to`` takes as long as a small product to find it out."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def column_norms(matrix: Tensor, order: int) -> Tensor:
    """The 1-norm, or the square of the 2-norm, of every column, (..., columns), in fp32 or wider.

    ``torch.linalg.vector_norm`` along columns takes 9 times as long on a CPU.
    """
    parts = [part for (part,) in chunks(matrix)]
    height = parts[0].shape[-2] if parts else 0
    wide = torch.promote_types(matrix.real.dtype, torch.float32)
    # Of rows with the same number within their part.
    sums = torch.zeros(*matrix.shape[:-2], height, matrix.shape[-1], dtype=wide, device=matrix.device)
    for part in parts:
        magnitude = cast(part.abs() if order == 1 or part.is_complex() else part, wide)
        some = sums[..., : part.shape[-2], :]
        some.add_(magnitude) if order == 1 else some.addcmul_(magnitude, magnitude)
    return sums.sum(-2)


def as_batch(name: str, tensor: Tensor) -> Tensor:
    """The view (matrices, rows, columns) of a tensor (..., rows, columns).

    Raises:
        ValueError: fewer than two axes, or leading axes that have no common stride.
    """
    if tensor.ndim == 3:
        return tensor
    if tensor.ndim == 2:
        return tensor.unsqueeze(0)
    try:
        *batch, rows, columns = tensor.shape
        return tensor.view(math.prod(batch), rows, columns)
    # No two axes, or no common stride.
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"Invalid {name}: shape {tuple(tensor.shape)} with strides {tensor.stride()}, "
            "expected (..., rows, columns) whose leading axes are one in memory"
        ) from error


def row_blocks(tensor: Tensor, size: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Matrices and rows of the parts of a (matrices, rows, columns): some whole matrices, or some rows of one.

    At least two parts; an eighth of all at a time where every part is a launch, and all at once for a compiler, which
    makes one kernel of the whole.

    Args:
        size: values of a part on a CPU, at least a row; None for a chunk.
    """
    matrices, rows, columns = tensor.shape
    if torch.compiler.is_compiling():
        size = tensor.numel()
    elif tensor.device.type == "cpu":
        size = min(CHUNK if size is None else size, -(-tensor.numel() // 2))
    else:
        size = -(-tensor.numel() // 8)
    whole = max(1, size // max(1, rows * columns))
    some = max(1, min(rows, size // max(1, columns)))
    for first in range(0, matrices, whole):
        for row in range(0, rows, some):
            yield slice(first, min(first + whole, matrices)), slice(row, min(row + some, rows))
