"""Triton twin of ``lowrank_optim.ops.lowrank_update_int4``: that of int8 weights, two codes of a byte side by side."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import Unpack

from lowrank_kernels import lowrank_update_int8
from lowrank_kernels._cases import AotCase
from lowrank_kernels._support import scalar
from lowrank_kernels.lowrank_update import COLUMNS
from lowrank_kernels.rounding import random_bits, round_to_whole
from lowrank_kernels.tiles import grouped_tile, rescaled, tile_product
from lowrank_optim.ops.int4_weight import GROUP
from lowrank_optim.ops.lowrank_update_int8 import Move
from lowrank_optim.ops.quantized_weight import INT4


@triton.jit
def rounded(value, per_unit, position, key, step):
    """Codes 1..15 of fp32 values, up with the probability of the part that is cut off, evenly over the steps."""
    turn = (tl.zeros_like(position) + step).to(tl.uint32) * 0x9E3779B9
    bits = random_bits(position, tl.zeros_like(position) + key) + turn
    ticks = round_to_whole(value * per_unit[:, None], bits)
    return tl.minimum(tl.maximum(ticks, -7.0), 7.0).to(tl.int32) + 8


@triton.jit(do_not_specialize=["key", "step", "alpha", "decay", "grad_alpha"])
def lowrank_update_int4_kernel(
    codes_ptr,  # (m, ceil(n / 2)) uint8, modified in place
    scale_ptr,  # (m, groups) fp32, modified in place
    left_ptr,  # (m, rank), or None
    right_ptr,  # (n, rank), dtype of left, or None
    grad_ptr,  # (m, n), any floating dtype, or None
    row_scale_ptr,  # (m,) or one number, contiguous, or None
    column_scale_ptr,  # (n,), contiguous, or None
    key,  # an int32, or a pointer to one
    step,  # an int32, or a pointer to a number
    alpha,  # a number, or a pointer to one
    decay,  # likewise
    grad_alpha,  # likewise
    m,
    n,
    rank,
    left_stride_m,
    left_stride_k,
    right_stride_n,
    right_stride_k,
    grad_stride_m,
    grad_stride_n,
    ONE_ROW_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # one group
    BLOCK_K: tl.constexpr,
):
    tile_m, group = grouped_tile(m, n, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = group * BLOCK_N + tl.arange(0, BLOCK_N)
    pairs = group * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    key = scalar(key, tl.int32)
    step = scalar(step, tl.int32)
    alpha = scalar(alpha, tl.float32)
    decay = scalar(decay, tl.float32)
    grad_alpha = scalar(grad_alpha, tl.float32)

    moved = alpha * tile_product(
        left_ptr, right_ptr, rows, columns, m, n, rank, left_stride_m, left_stride_k, right_stride_n, right_stride_k,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    if grad_ptr is not None:
        grad = tl.load(
            grad_ptr + rows[:, None] * grad_stride_m + columns[None, :] * grad_stride_n, mask=mask, other=0.0
        )
        moved += grad_alpha * rescaled(grad, rows, columns, row_scale_ptr, column_scale_ptr, m, n, ONE_ROW_SCALE)
    even, odd = tl.split(tl.reshape(tl.where(mask, moved, 0.0), (BLOCK_M, BLOCK_N // 2, 2)))

    width = tl.cdiv(n, 2)
    codes = codes_ptr + rows[:, None] * width + pairs[None, :]
    mask = (rows < m)[:, None] & (pairs < width)[None, :]
    # What stands for zeros.
    byte = tl.load(codes, mask=mask, other=0x88).to(tl.int32)
    scale = scale_ptr + rows * tl.cdiv(n, BLOCK_N) + group
    unit = tl.load(scale, mask=rows < m, other=0.0)[:, None]
    even += ((byte & 15) - 8).to(tl.float32) * unit * decay
    odd += ((byte >> 4) - 8).to(tl.float32) * unit * decay

    largest = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    unit = tl.div_rn(largest, tl.full((BLOCK_M,), 7.0, tl.float32))
    tl.store(scale, unit, mask=rows < m)
    # The smallest normal number keeps the reciprocal finite.
    per_unit = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.maximum(unit, 1.1754943508222875e-38))
    position = rows[:, None] * n + 2 * pairs[None, :]
    low = rounded(even, per_unit, position, key, step)
    high = rounded(odd, per_unit, position + 1, key, step)
    tl.store(codes, (low | (high << 4)).to(tl.uint8), mask=mask)


def lowrank_update_int4_(
    codes: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None, *, columns: int, key: int | Tensor,
    step: int | Tensor, **move: Unpack[Move],
) -> None:  # fmt: skip
    """See ``lowrank_optim.ops.lowrank_update_int4``.

    Raises:
        ValueError: as that of int8 weights.
    """
    lowrank_update_int8.launch(
        lowrank_update_int4_kernel, INT4, launch_options, codes, scale, left, right, columns, (key, step), **move
    )


def launch_options(dtype: torch.dtype | None, rank: int, *, gradient: bool) -> dict[str, Any]:
    """Those of int8 weights with tiles as large: a group is half as wide, so that twice as many rows fit."""
    options = lowrank_update_int8.launch_options(dtype, rank, gradient=True)
    return {**options, "BLOCK_N": GROUP, "BLOCK_M": 2 * options["BLOCK_M"]}


def aot_cases() -> list[AotCase]:
    # Scales of columns change as little here as in the kernel of int8 weights.
    kinds = [kind for kind in lowrank_update_int8.KINDS if COLUMNS[0] not in kind[1]]
    return lowrank_update_int8.cases_of("lowrank_update_int4", lowrank_update_int4_kernel, launch_options, "*u8", kinds)
