"""Triton twin of ``lowrank_optim.ops.move_columns_``: whole rows at a time, without a copy of the matrix."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import aot_case
from lowrank_kernels._support import cdiv, check_operand, power_of_2
from lowrank_optim.ops.move_columns import move_columns_ as eager

# Values of a program; a longer row stays with torch.
BLOCK = 4096


@triton.jit
def move_columns_kernel(
    matrix_ptr,  # (matrices, rows, r), contiguous, modified in place
    source_ptr,  # (matrices, r) int64, contiguous
    rows,
    r,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    source = tl.load(source_ptr + matrix * r + column, mask=column < r, other=-1)
    at = matrix_ptr + (matrix * rows + row[:, None]) * r
    mask = (row[:, None] < rows) & (column[None, :] < r)
    values = tl.load(at + source[None, :], mask=mask & (source[None, :] >= 0), other=0.0)
    # All of these rows have been read before any of them is written.
    tl.debug_barrier()
    tl.store(at + column[None, :], values, mask=mask)


def move_columns_(matrix: Tensor, source: Tensor) -> None:
    """See ``lowrank_optim.ops.move_columns_``; long rows, complex and strided matrices stay with torch.

    Raises:
        ValueError: a source of another shape, device or dtype than the matrix asks for.
    """
    *batch, rows, r = matrix.shape
    check_operand("source", source, (*batch, r), matrix.device, (torch.int64,), contiguous=False)
    block = power_of_2(r)
    if block > BLOCK or not matrix.is_contiguous() or matrix.is_complex():
        eager(matrix, source)
        return
    if matrix.numel():
        lines = BLOCK // block
        grid = (cdiv(rows, lines), math.prod(batch))
        move_columns_kernel[grid](matrix, source.contiguous(), rows, r, ROWS=lines, BLOCK=block, num_warps=8)


def aot_cases():
    return [
        aot_case(
            f"move_columns, {block}", move_columns_kernel, {"source_ptr": "*i64"},
            {"ROWS": BLOCK // block, "BLOCK": block, "num_warps": 8},
        )
        for block in (128, BLOCK)
    ]  # fmt: skip
