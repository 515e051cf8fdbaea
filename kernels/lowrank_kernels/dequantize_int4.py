"""Triton twin of ``lowrank_optim.ops.int4.dequantize_int4``: one pass, half a byte in and a value out."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import aot_case
from lowrank_kernels._support import cdiv, check_operand
from lowrank_kernels.rounding import round_to_nearest
from lowrank_optim.ops.int4 import group_count, packed_shape

BLOCK = 1024


@triton.jit
def dequantize_int4_kernel(
    codes_ptr,  # (matrices, rows, packed) uint8
    scale_ptr,  # (matrices, groups) fp32
    zero_ptr,  # (matrices, groups) uint8
    out_ptr,  # (matrices, rows, columns), written
    size,  # rows * columns
    columns,
    rows_of_bytes,  # rows * packed
    packed,
    groups,
    group_size,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    row, column = place // columns, place % columns
    byte = tl.load(codes_ptr + matrix * rows_of_bytes + row * packed + column // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(column % 2 == 0, byte & 15, byte >> 4).to(tl.float32)
    group = matrix * groups + place // group_size
    zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    value = (code - zero) * tl.load(scale_ptr + group, mask=mask, other=0.0)
    tl.store(out_ptr + matrix * size + place, round_to_nearest(value, out_ptr.dtype.element_ty), mask=mask)


def dequantize_int4(
    codes: Tensor, scale: Tensor, zero: Tensor, columns: int, *, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See ``lowrank_optim.ops.int4``.

    Raises:
        ValueError: operands that do not fit each other, or 2^31 values or more in a matrix.
    """
    *batch, rows, _ = codes.shape
    groups, device = group_count(rows, columns, group_size), codes.device
    check_operand("codes", codes, (*batch, *packed_shape(rows, columns)), device, (torch.uint8,))
    check_operand("scale", scale, (*batch, groups), device, (torch.float32,))
    check_operand("zero", zero, (*batch, groups), device, (torch.uint8,))
    size, packed, matrices = rows * columns, codes.shape[-1], math.prod(batch)
    if size >= 2**31 - BLOCK:
        raise ValueError(f"Invalid codes: {rows} x {columns} values, expected fewer than 2^31 - {BLOCK}")
    out = torch.empty(*batch, rows, columns, dtype=dtype, device=device)
    if out.numel():
        dequantize_int4_kernel[(cdiv(size, BLOCK), matrices)](
            codes, scale, zero, out, size, columns, rows * packed, packed, groups, group_size, BLOCK=BLOCK
        )
    return out


def aot_cases():
    types = {"codes_ptr": "*u8", "zero_ptr": "*u8", "out_ptr": "*bf16"}
    return [aot_case("dequantize_int4", dequantize_int4_kernel, types, {"BLOCK": BLOCK})]
