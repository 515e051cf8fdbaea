"""What the kernels with a matrix product share: the size of their tiles and the order in which they are computed."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from lowrank_kernels._support import power_of_2
from lowrank_kernels.rounding import INTERPRETED


def tile_options(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Tiles, warps and stages for operands of ``dtype``, and the precision of their product.

    128 x 128 outputs reuse an operand 128 times. Three stages of 64 two-byte or 32 four-byte steps are 96 KB, which
    sm_89 (99 KB) has just room for. Without tensor cores (fp32, unless torch allows TF32) the accumulator and both
    operands stand in registers, which 64 x 64 outputs leave room for.

    Args:
        rank: length of the sum; steps are no longer than it.
    """
    return {**_tiles(dtype, rank, dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32)}


@functools.cache
def _tiles(dtype: torch.dtype, rank: int, precise: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": 8, "num_stages": 3}
    if precise:
        options |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PRECISION": "ieee"}
    else:
        step = 32 if dtype == torch.float32 else 64
        options |= {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": step, "PRECISION": "tf32"}
    return {**options, "BLOCK_K": min(options["BLOCK_K"], max(16, power_of_2(rank)))}


@triton.jit
def grouped_tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile (row, column) of a program: eight rows of tiles at a time, so that operands are met again in L2."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program, group = tl.program_id(0), 8 * tiles_n
    first = program // group * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + program % group % height, program % group // height


@triton.jit
def rescaled(
    grad, rows, columns, row_scale_ptr, column_scale_ptr, m, n, ONE_ROW_SCALE: tl.constexpr
):  # fmt: skip
    """row_scale grad column_scale in fp32, for one tile; 0 where a scale is, whatever the gradient holds."""
    grad = grad.to(tl.float32)
    # Zero times NaN is NaN.
    if row_scale_ptr is not None:
        if ONE_ROW_SCALE:
            scale = tl.load(row_scale_ptr).to(tl.float32)
            grad = tl.where(scale != 0, scale * grad, 0.0)
        else:
            scale = tl.load(row_scale_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
            grad = tl.where(scale != 0, scale * grad, 0.0)
    if column_scale_ptr is not None:
        scale = tl.load(column_scale_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        grad = tl.where(scale != 0, scale * grad, 0.0)
    return grad


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in fp32."""
    if INTERPRETED:
        # Which multiplies the bits of bfloat16 as if they were integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tile_product(
    left_ptr, right_ptr, rows, columns, m, n, rank, left_stride_m, left_stride_k, right_stride_n, right_stride_k,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left rightᵀ for one tile; where ``left_ptr`` is None, zeros."""
    product = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    if left_ptr is not None:
        steps = tl.arange(0, BLOCK_K)
        # Rows past the end are read from the start instead: no mask, and nobody looks at the result.
        left = left_ptr + (rows % m)[:, None] * left_stride_m + steps[None, :] * left_stride_k
        right = right_ptr + steps[:, None] * right_stride_k + (columns % n)[None, :] * right_stride_n
        for k in range(0, rank, BLOCK_K):
            inside = steps < rank - k
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
            product = add_product(a, b, product, PRECISION)
            left += BLOCK_K * left_stride_k
            right += BLOCK_K * right_stride_k
    return product


def aot_cases() -> list[object]:
    """None: these are parts of kernels."""
    return []
