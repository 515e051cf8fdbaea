"""Standard normal numbers that are a function of their key and position: never stored, the same on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import random_bits


def gaussian(
    rows: int, columns: int, *, key: int | Tensor, dtype: torch.dtype, device: torch.device,
    batch: Sequence[int] = (), first: int = 0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Matrices (*batch, rows, columns) of independent N(0, scale²): Box and Muller's transform of a counter's hash.

    A generator would have to be seeded anew at every call, has another stream on every kind of device, and cannot be
    replayed in a CUDA graph.

    Args:
        key: which matrices, an int or a 0-d int32 tensor; see :func:`lowrank_optim.ops.rounding.mix_key`.
        dtype: a real floating dtype.
        batch: leading axes; matrix i of a key is the same numbers whatever stands beside it.
        first: number of the first matrix, where these are some of a larger batch.
    """
    if device.type == "meta":
        return torch.empty(*batch, rows, columns, dtype=dtype, device=device)
    size, matrices = rows * columns, math.prod(batch)
    half = (size + 1) // 2
    bits = random_bits(torch.empty(matrices, 2 * half, device=device), key, first * 2 * half)
    # 31 bits and half a step: the logarithm never meets a zero. (fp32 rounds the largest up to 1, which is harmless.)
    uniform = bits.bitwise_and_(0x7FFFFFFF).to(torch.promote_types(dtype, torch.float32)).add_(0.5).mul_(2.0**-31)
    radius = uniform[:, :half].log_().mul_(-2).sqrt_()
    angle = uniform[:, half:].mul_(2 * math.pi)
    radius *= scale
    # In place: on a CPU new memory of this size takes as long as the arithmetic.
    cosine = angle.cos().mul_(radius)
    angle.sin_().mul_(radius)
    radius.copy_(cosine)
    return uniform[:, :size].reshape(*batch, rows, columns).to(dtype)
