"""Standard normal numbers that are a function of their key and position: never stored, the same on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(x: Any) -> Any:
    """Scramble 32-bit words: an int or an int64 tensor in [0, 2^32).

    Two rounds of shift, xor and multiply. The multipliers are 0x21f0aaad and 0xd35a2d97; the second is taken
    modulo 2^32 as a negative number, so that no product leaves int64.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK
    x = (x ^ (x >> 15)) * (0xD35A2D97 - (1 << 32)) & MASK
    return x ^ (x >> 15)


def gaussian(
    rows: int, columns: int, *, seed: int, draw: int | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A (rows, columns) matrix of independent N(0, 1) by Box and Muller's transform of a counter's hash.

    A generator would have to be seeded anew at every call, has another stream on every kind of device, and cannot be
    replayed in a CUDA graph.

    Args:
        seed: an int >= 0.
        draw: which matrix of this seed, an int or an int64 0-d tensor.
        dtype: a real floating dtype.
    """
    size = rows * columns
    half = (size + 1) // 2
    key = mix(mix(seed & MASK) ^ draw)
    words = torch.arange(2 * half, device=device)
    words = mix(mix(words) ^ key).to(torch.promote_types(dtype, torch.float32))
    # Half a step off the ends: log(0) never occurs.
    uniform = words.add_(0.5).mul_(2.0**-32)
    radius = uniform[:half].log().mul_(-2).sqrt_()
    angle = uniform[half:].mul_(2 * math.pi)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()))
    return normal[:size].view(rows, columns).to(dtype)
