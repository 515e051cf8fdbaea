"""Triton twin of ``lowrank_optim.ops.dct_select``: all norms in one pass over the matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import aot_case
from lowrank_kernels._support import cdiv
from lowrank_optim.ops.chunks import as_batch
from lowrank_optim.ops.dct_select import dct_select as eager
from lowrank_optim.ops.dct_select import greatest

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
# Rows of a program, whose sums a second, deterministic sum adds up.
ROWS = 512


@triton.jit
def column_scores_kernel(
    scored_ptr,  # (matrices, rows, columns), rows contiguous
    partial_ptr,  # (matrices, ceil(rows / ROWS), columns), contiguous
    rows,
    columns,
    matrix_stride,
    row_stride,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    part = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    scored_ptr += matrix * matrix_stride
    partial_ptr += matrix * tl.num_programs(1) * columns
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = part * ROWS + start + tl.arange(0, BLOCK_ROWS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(scored_ptr + row[:, None].to(tl.int64) * row_stride + column[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        total += values * values if SQUARE else tl.abs(values)
    tl.store(partial_ptr + part * columns + column, tl.sum(total, 0), mask=column < columns)


def dct_select(scored: Tensor, rank: int, *, ell_norm: int) -> Tensor:
    """See ``lowrank_optim.ops.dct_select``; the scores in one pass, the order of a few thousand of them by torch."""
    if scored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return eager(scored, rank, ell_norm=ell_norm)
    shape = scored.shape
    scored = as_batch("scored", scored if scored.stride(-1) == 1 else scored.contiguous())
    matrices, rows, columns = scored.shape
    parts = cdiv(rows, ROWS)
    partial = torch.empty(matrices, parts, columns, dtype=torch.float32, device=scored.device)
    if partial.numel():
        column_scores_kernel[(cdiv(columns, BLOCK_COLUMNS), parts, matrices)](
            scored, partial, rows, columns, *scored.stride()[:2], SQUARE=ell_norm == 2,
            ROWS=ROWS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
        )  # fmt: skip
    return greatest(partial.sum(1).view(*shape[:-2], columns), rank)


def aot_cases():
    constants = {"ROWS": ROWS, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return [
        aot_case(f"dct_select, {norm}-norm", column_scores_kernel, {}, {**constants, "SQUARE": norm == 2})
        for norm in (1, 2)
    ]
