"""Triton twin of ``lowrank_optim.ops.gaussian``: one kernel, one write an element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import aot_case
from lowrank_kernels._support import cdiv, check_scalar, scalar
from lowrank_kernels.rounding import random_bits

BLOCK = 1024


@triton.jit
def uniform(position, key):
    # 31 bits and half a step, in (0, 1].
    bits = random_bits(position, key)
    return ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * (1.0 / 2147483648.0)


@triton.jit
def cosine_and_sine(turns):
    # Of an angle in turns, from 0 to 1. tl.sin and tl.cos also reduce huge angles, for which they take local memory.
    quarter = (4.0 * turns + 0.5).to(tl.int32)
    angle = (4.0 * turns - quarter.to(tl.float32)) * 1.5707963267948966
    # Taylor series, off by 3e-8 and 2e-9 at an eighth of a turn.
    x = angle * angle
    cosine = 1.0 + x * (-1.0 / 2 + x * (1.0 / 24 + x * (-1.0 / 720 + x * (1.0 / 40320))))
    sine = angle * (1.0 + x * (-1.0 / 6 + x * (1.0 / 120 + x * (-1.0 / 5040 + x * (1.0 / 362880)))))
    odd = quarter % 2 == 1
    cosine, sine = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((quarter + 1) % 4 >= 2, -cosine, cosine), tl.where(quarter % 4 >= 2, -sine, sine)


@triton.jit
def draw(out_ptr, program, matrix, number, key, size, scale, half, BLOCK: tl.constexpr):
    """A block of pairs of ``matrix``, which in the counter has another ``number``."""
    one = program * BLOCK + tl.arange(0, BLOCK)
    other = one + half
    start = number * 2 * half
    word = tl.full((BLOCK,), 0, tl.int32) + key
    radius = scale * tl.sqrt(-2.0 * tl.log(uniform(one + start, word)))
    cosine, sine = cosine_and_sine(uniform(other + start, word))
    out_ptr += matrix.to(tl.int64) * size
    tl.store(out_ptr + one, radius * cosine, mask=one < half)
    tl.store(out_ptr + other, radius * sine, mask=other < size)


@triton.jit(do_not_specialize=["key", "first"])
def gaussian_kernel(
    out_ptr,  # (matrices, size) any floating dtype
    key,  # an int32, or a pointer to one
    first,  # number of the first matrix
    size,
    scale,  # what all are multiplied with
    half,  # the pairs of Box and Muller: elements i and half + i
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1)
    draw(out_ptr, tl.program_id(0), matrix, first + matrix, scalar(key, tl.int32), size, scale, half, BLOCK)


def gaussian(
    rows: int, columns: int, *, key: int | Tensor, dtype: torch.dtype, device: torch.device,
    batch: Sequence[int] = (), first: int = 0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """See ``lowrank_optim.ops.gaussian``; computed in fp32 whatever the dtype.

    Raises:
        ValueError: numbers beyond position 2^31 of the counter, or so near to it that a block would cross it.
    """
    size, matrices = rows * columns, math.prod(batch)
    half = (size + 1) // 2
    check_counter((*batch, rows, columns), (first + matrices) * 2 * half)
    check_scalar("key", key, device, (torch.int32,))
    out = torch.empty(*batch, rows, columns, dtype=dtype, device=device)
    if out.numel():
        gaussian_kernel[(cdiv(half, BLOCK), matrices)](out, key, first, size, scale, half, BLOCK=BLOCK)
    return out


def check_counter(shape: Sequence[int], end: int) -> None:
    """Raise ValueError where the counter of the random bits, which has 32, would end past what a block may cross."""
    if end >= 2**31 - BLOCK:
        raise ValueError(f"Invalid shape: {tuple(shape)}, expected fewer than 2^31 - {BLOCK} elements in all")


def aot_cases():
    types = {"out_ptr": "*bf16", "scale": "fp32"}
    return [
        aot_case(f"gaussian, key {where}", gaussian_kernel, {**types, "key": key}, {"BLOCK": BLOCK})
        for where, key in (("from the host", "i32"), ("on the device", "*i32"))
    ]
