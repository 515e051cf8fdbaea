"""Triton twin of ``lowrank_optim.ops.limited_scale``: one kernel, in which every program sums over all rows."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import all_finite, cdiv, check_operand, check_scalar, power_of_2, scalar
from lowrank_kernels.lowrank_update import on_device
from lowrank_kernels.rounding import round_to_nearest
from lowrank_optim.ops.limited_scale import DEAD as LEAST_SHARE
from lowrank_optim.ops.limited_scale import GUARD as SMALL
from lowrank_optim.ops.limited_scale import limited_scale as eager
from lowrank_optim.ops.orthonormal import Sums

GUARD, DEAD = tl.constexpr(SMALL), tl.constexpr(LEAST_SHARE)
BLOCK = 1024
# Of a matrix: each reads three numbers a row, so that more would read more than they write.
PROGRAMS = 264


@triton.jit(do_not_specialize=["seen"])
def limited_scale_kernel(
    norms_ptr,  # (2, matrices, rows) fp32
    grad_norms_ptr,  # (matrices, rows) fp32
    update_norm_ptr,  # (matrices,) fp32
    image_ptr,  # (matrices, rows) fp32, or None
    low_ptr,  # (matrices, rows, rank) fp32, or None
    direction_ptr,  # (matrices, rows, rank) fp32, or None
    scale_ptr,  # (matrices, rows) fp32, written
    left_ptr,  # (matrices, rows, rank), written; or None
    kept_ptr,  # (matrices,) fp32, written where there is a limit; never update_norm itself, which all programs read
    rows,
    rank,
    inner,
    seen,  # a number, or a pointer to one
    strength,
    gamma,
    back,
    LIMITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    matrix, matrices = tl.program_id(1), tl.num_programs(1)
    seen = scalar(seen, tl.float32)
    direction_norms_ptr = norms_ptr + matrices * rows
    finite = all_finite(grad_norms_ptr, matrices * rows)
    first_row = matrix * rows
    low_total = tl.zeros((BLOCK,), dtype=tl.float32)
    direction_total = tl.zeros((BLOCK,), dtype=tl.float32)
    found_total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        low = tl.load(norms_ptr + first_row + row, mask=inside, other=0.0)
        direction = tl.load(direction_norms_ptr + first_row + row, mask=inside, other=0.0)
        grad = tl.load(grad_norms_ptr + first_row + row, mask=inside, other=0.0)
        if image_ptr is None:
            image = low * low
        else:
            image = tl.load(image_ptr + first_row + row, mask=inside, other=0.0)
        outside = tl.maximum(grad * grad - 2 * inner * low * low + inner * inner * image, 0.0)
        low_total += low * low
        direction_total += direction * direction
        if not WHOLE:
            phi = direction / (low + GUARD)
            outside = phi * phi * outside
        found_total += outside
    size = tl.sqrt_rn(tl.sum(direction_total, 0))
    found = tl.sum(found_total, 0)
    one_phi = size / (tl.sqrt_rn(tl.sum(low_total, 0)) + GUARD)
    if WHOLE:
        found = one_phi * one_phi * found
    found = tl.sqrt_rn(found) * seen
    finite = finite & (found < float("inf"))
    growth = 1.0
    if LIMITS:
        previous = tl.load(update_norm_ptr + matrix)
        growth = tl.maximum(found / ((previous + GUARD) * gamma), 1.0)
        growth = tl.where(previous > size * DEAD, growth, 1.0)
        if program == 0:
            tl.store(kept_ptr + matrix, tl.where(finite, found / growth, previous))
    factor = tl.where(finite, strength / growth, 0.0)

    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        if WHOLE:
            scale = tl.zeros((ROWS,), dtype=tl.float32) + one_phi * factor
        else:
            of_low = tl.load(norms_ptr + first_row + row, mask=inside, other=0.0)
            of_direction = tl.load(direction_norms_ptr + first_row + row, mask=inside, other=0.0)
            scale = of_direction / (of_low + GUARD) * factor
        # NaN times zero is NaN.
        scale = tl.where(finite, scale, 0.0)
        tl.store(scale_ptr + first_row + row, scale, mask=inside)
        if left_ptr is not None:
            place = (tl.zeros((ROWS,), dtype=tl.int64) + first_row + row) * rank
            for first in range(0, rank, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                at = place[:, None] + column[None, :]
                mask = inside[:, None] & (column < rank)[None, :]
                low_tile = tl.load(low_ptr + at, mask=mask, other=0.0)
                rescaled = tl.where(scale[:, None] != 0, scale[:, None] * low_tile, 0.0)
                left = tl.load(direction_ptr + at, mask=mask, other=0.0) - back * rescaled
                tl.store(left_ptr + at, round_to_nearest(left, left_ptr.dtype.element_ty), mask=mask)


def limited_scale(
    norms: Tensor, grad_norms: Tensor, update_norm: Tensor, *, gamma: float | None, inner: float = 0.0,
    seen: float | Tensor = 1.0, strength: float = 1.0, whole: bool = False, image: Tensor | None = None,
    low: Tensor | None = None, direction: Tensor | None = None, back: float = 0.0, dtype: torch.dtype | None = None,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See ``lowrank_optim.ops.limited_scale``; all in fp32 but ``left``, all contiguous; what other processes have a
    part of stays with torch.

    Raises:
        ValueError: an operand of another shape, dtype, device or layout than the norms ask for.
    """
    if sums is not None:
        return eager(
            norms, grad_norms, update_norm, gamma=gamma, inner=inner, seen=seen, strength=strength, whole=whole,
            image=image, low=low, direction=direction, back=back, dtype=dtype, sums=sums,
        )  # fmt: skip
    fp32, device = (torch.float32,), norms.device
    _, *batch, rows = norms.shape
    rank = 0 if low is None else low.shape[-1]
    check_operand("norms", norms, (2, *batch, rows), device, fp32)
    check_operand("grad_norms", grad_norms, (*batch, rows, 1), device, fp32)
    check_operand("update_norm", update_norm, tuple(batch), device, fp32)
    check_operand("image", image, (*batch, rows, 1), device, fp32)
    check_operand("low", low, (*batch, rows, rank), device, fp32)
    check_operand("direction", direction, (*batch, rows, rank), device, fp32)
    check_scalar("seen", seen, device, (torch.float32, torch.float64))
    if low is None or direction is None:
        low = direction = None
    scale = torch.empty_like(grad_norms)
    left = None if direction is None else torch.empty_like(direction, dtype=dtype)
    matrices = math.prod(batch)
    if not rows * matrices:
        return scale, update_norm, left
    kept = update_norm if gamma is None else torch.empty_like(update_norm)
    options = launch_options(rank)
    tiles = cdiv(rows, options["ROWS"])
    seen = on_device(device, seen)
    limited_scale_kernel[(1 if left is None else min(tiles, PROGRAMS), matrices)](
        norms, grad_norms, update_norm, image, low, direction, scale, left, kept, rows, rank, inner,
        seen, strength, 1.0 if gamma is None else gamma, back, LIMITS=gamma is not None, WHOLE=whole, **options,
    )  # fmt: skip
    return scale, kept, left


@functools.cache
def launch_options(rank: int) -> dict[str, Any]:
    """Rows and columns that a program works on at a time: 2048 values, or without a direction some rows' scales."""
    columns = min(256, power_of_2(max(1, rank)))
    return {"BLOCK": BLOCK, "ROWS": 2048 // columns, "COLUMNS": columns, "num_warps": 8}


def aot_cases() -> list[AotCase]:
    """APOLLO's and Fira's."""
    types = {"left_ptr": "*bf16", **dict.fromkeys(("inner", "seen", "strength", "gamma", "back"), "fp32")}
    constants = {"LIMITS": True, "WHOLE": False, "image_ptr": None}
    without = dict.fromkeys(("low_ptr", "direction_ptr", "left_ptr"))
    return [
        aot_case("limited_scale", limited_scale_kernel, types, {**constants, **without, **launch_options(0)}),
        aot_case("limited_scale, direction", limited_scale_kernel, types, {**constants, **launch_options(256)}),
    ]
