"""Triton twin of ``lowrank_optim.ops.sketch``: one kernel, some of whose programs draw while the others take norms."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import batch_strides, cdiv, check_operand, check_scalar, scalar
from lowrank_kernels.gaussian import BLOCK, check_counter, draw
from lowrank_optim.ops.sketch import sketch as eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["key"])
def sketch_kernel(
    grad_ptr,  # (matrices, rows, columns) any floating dtype
    basis_ptr,  # (matrices, size), written
    norms_ptr,  # (matrices, rows) fp32, written
    key,  # an int32, or a pointer to one
    size,
    scale,  # what all random numbers are multiplied with
    half,  # the pairs of Box and Muller
    rows,
    columns,
    stride_e,
    stride_row,
    stride_column,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, matrix = tl.program_id(0), tl.program_id(1)
    drawing = tl.cdiv(half, BLOCK)
    if program < drawing:
        draw(basis_ptr, program, matrix, matrix, scalar(key, tl.int32), size, scale, half, BLOCK)
    else:
        row = (program - drawing) * ROWS + tl.arange(0, ROWS)
        start = grad_ptr + matrix.to(tl.int64) * stride_e + row.to(tl.int64)[:, None] * stride_row
        squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            grad = tl.load(start + column.to(tl.int64)[None, :] * stride_column, mask=mask, other=0.0).to(tl.float32)
            squares += grad * grad
        tl.store(norms_ptr + matrix * rows + row, tl.sqrt_rn(tl.sum(squares, axis=1)), mask=row < rows)


def sketch(grad: Tensor, rank: int, *, key: int | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See ``lowrank_optim.ops.sketch``; of gradients of at most 32 bits.

    Raises:
        ValueError: a gradient of another dtype, or more random numbers than their counter can tell apart.
    """
    *batch, rows, columns = shape = grad.shape
    device = grad.device
    check_operand("grad", grad, shape, device, DTYPES, contiguous=False)
    check_scalar("key", key, device, (torch.int32,))
    if not grad.numel():
        return eager(grad, rank, key=key, scale=scale)
    basis = torch.empty(*batch, columns, rank, dtype=grad.dtype, device=device)
    norms = torch.empty(*batch, rows, 1, dtype=torch.float32, device=device)
    size, matrices, strides = columns * rank, math.prod(batch), batch_strides("grad", grad)
    half = (size + 1) // 2
    check_counter(basis.shape, matrices * 2 * half)
    options = launch_options(strides[-1])
    programs = cdiv(half, BLOCK) + cdiv(rows, options["ROWS"])
    sketch_kernel[(programs, matrices)](
        grad, basis, norms, key, size, scale, half, rows, columns, *strides, BLOCK=BLOCK,
        **options,
    )  # fmt: skip
    return basis, norms


def launch_options(stride_column: int) -> dict[str, Any]:
    """Tiles of 2048 values, long in the direction in which memory runs."""
    rows = 4 if stride_column == 1 else 32
    return {"ROWS": rows, "COLUMNS": 2048 // rows, "num_warps": 4}


def aot_cases() -> list[AotCase]:
    """Of a tall and of a wide gradient."""
    types = {"grad_ptr": "*bf16", "basis_ptr": "*bf16", "scale": "fp32"}
    return [
        aot_case(f"sketch, {label}", sketch_kernel, types, {"BLOCK": BLOCK, along: 1, **launch_options(stride_column)})
        for label, along, stride_column in (("rows", "stride_column", 1), ("columns", "stride_row", 2))
    ]
