"""Triton twin of ``lowrank_optim.ops.lowrank_update_int8``: one product whose tile owns whole groups of the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import Unpack

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import FLOATING, batch_strides, cdiv, check_operand, check_scales, power_of_2, scalar
from lowrank_kernels.lowrank_update import COLUMNS, ROWS, absent, gradient, halves, on_device
from lowrank_kernels.rounding import random_bits, round_to_whole
from lowrank_kernels.tiles import grouped_tile, rescaled, tile_product
from lowrank_optim.ops.int8_weight import GROUP
from lowrank_optim.ops.lowrank_update_int8 import Move
from lowrank_optim.ops.quantized_weight import INT8, Format

QUARTER = tl.constexpr(64)


@triton.jit
def moved(
    product, rows, columns, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay, grad_alpha,
    m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """decay weight + product + grad_alpha rescaled grad, fp32, for some columns of a group; 0 outside of the weight."""
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    code = tl.load(codes_ptr + rows[:, None] * n + columns[None, :], mask=mask, other=0)
    value = code.to(tl.float32) * step[:, None] * decay + tl.where(mask, product, 0.0)
    if grad_ptr is not None:
        grad = tl.load(
            grad_ptr + rows[:, None] * grad_stride_m + columns[None, :] * grad_stride_n, mask=mask, other=0.0
        )
        value += grad_alpha * rescaled(grad, rows, columns, row_scale_ptr, column_scale_ptr, m, n, ONE_ROW_SCALE)
    return value


@triton.jit
def moved_half(
    product, rows, first, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay, grad_alpha,
    m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """Two quarters of a group, one after the other to save registers, and the largest magnitudes of their rows."""
    one, two = halves(product)
    columns = first + tl.arange(0, QUARTER)
    one = moved(
        one, rows, columns, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay, grad_alpha,
        m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE,
    )  # fmt: skip
    two = moved(
        two, rows, columns + QUARTER, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay, grad_alpha,
        m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE,
    )  # fmt: skip
    return one, two, tl.maximum(tl.max(tl.abs(one), axis=1), tl.max(tl.abs(two), axis=1))


@triton.jit
def keep(value, rows, columns, codes_ptr, per_unit, key, m, n):
    """Round stochastically and store."""
    position = rows[:, None] * n + columns[None, :]
    ticks = round_to_whole(value * per_unit[:, None], random_bits(position, tl.zeros_like(position) + key))
    ticks = tl.minimum(tl.maximum(ticks, -127.0), 127.0)
    tl.store(codes_ptr + position, ticks.to(tl.int8), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit(do_not_specialize=["key", "alpha", "decay", "grad_alpha"])
def lowrank_update_int8_kernel(
    codes_ptr,  # (m, n) int8, modified in place
    scale_ptr,  # (m, groups) fp32, modified in place
    left_ptr,  # (m, rank), or None
    right_ptr,  # (n, rank), dtype of left, or None
    grad_ptr,  # (m, n), any floating dtype, or None
    row_scale_ptr,  # (m,) or one number, contiguous, or None
    column_scale_ptr,  # (n,), contiguous, or None
    key,  # an int32, or a pointer to one
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
    first = group * BLOCK_N
    key = scalar(key, tl.int32)
    alpha = scalar(alpha, tl.float32)
    decay = scalar(decay, tl.float32)
    grad_alpha = scalar(grad_alpha, tl.float32)

    product = tile_product(
        left_ptr, right_ptr, rows, first + tl.arange(0, BLOCK_N), m, n, rank, left_stride_m, left_stride_k,
        right_stride_n, right_stride_k, PRECISION, BLOCK_K,
    )  # fmt: skip
    scale = scale_ptr + rows * tl.cdiv(n, BLOCK_N) + group
    step = tl.load(scale, mask=rows < m, other=0.0)
    left_half, right_half = halves(product * alpha)
    v0, v1, largest = moved_half(
        left_half, rows, first, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay, grad_alpha,
        m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE,
    )  # fmt: skip
    v2, v3, largest_right = moved_half(
        right_half, rows, first + 2 * QUARTER, codes_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, step, decay,
        grad_alpha, m, n, grad_stride_m, grad_stride_n, ONE_ROW_SCALE,
    )  # fmt: skip
    step = tl.div_rn(tl.maximum(largest, largest_right), tl.full((BLOCK_M,), 127.0, tl.float32))
    tl.store(scale, step, mask=rows < m)
    # The smallest normal number keeps the reciprocal finite.
    per_unit = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.maximum(step, 1.1754943508222875e-38))
    columns = first + tl.arange(0, QUARTER)
    keep(v0, rows, columns, codes_ptr, per_unit, key, m, n)
    keep(v1, rows, columns + QUARTER, codes_ptr, per_unit, key, m, n)
    keep(v2, rows, columns + 2 * QUARTER, codes_ptr, per_unit, key, m, n)
    keep(v3, rows, columns + 3 * QUARTER, codes_ptr, per_unit, key, m, n)


def lowrank_update_int8_(
    codes: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None, *, key: int | Tensor, **move: Unpack[Move]
) -> None:
    """See ``lowrank_optim.ops.lowrank_update_int8``.

    Raises:
        ValueError: as :func:`launch`.
    """
    columns = codes.shape[1]
    launch(lowrank_update_int8_kernel, INT8, launch_options, codes, scale, left, right, columns, (key,), **move)


def launch(
    kernel: Any, stored: Format, tiles: Callable[..., dict[str, Any]], codes: Tensor, scale: Tensor,
    left: Tensor | None, right: Tensor | None, columns: int, random: tuple[int | Tensor, ...],
    *, alpha: float | Tensor = 1.0, decay: float | Tensor = 1.0, grad: Tensor | None = None,
    grad_alpha: float | Tensor = 1.0, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Check the operands of the update of a quantized weight (m, ``columns``) and launch its kernel.

    Args:
        stored: what the weight is stored as.
        tiles: the ``launch_options`` of the kernel.
        random: the last of the kernel's arguments that are no scalars of the update; each may be on the device.

    Raises:
        ValueError: 2^31 elements or more, which a 32-bit counter cannot tell apart, or an operand of another shape,
            device or kind than the codes ask for.
    """
    shape, device = torch.Size((codes.shape[0], columns)), codes.device
    m, n = shape
    if m * n >= 2**31:
        raise ValueError(f"Invalid shape: {tuple(shape)}, expected fewer than 2^31 elements")
    if not m * n:
        return
    if left is None or right is None:
        left = right = None
    if row_scale is None and column_scale is None:
        grad = None
    rank = 0 if left is None else left.shape[1]
    check_operand("codes", codes, stored.codes_shape(m, n), device, (stored.dtype,))
    check_operand("scale", scale, stored.scale_shape(m, n), device, (torch.float32,))
    check_operand("left", left, (m, rank), device, contiguous=False)
    check_operand("right", right, (n, rank), device, FLOATING if left is None else (left.dtype,), contiguous=False)
    check_operand("grad", grad, shape, device, contiguous=False)
    check_scales(row_scale, column_scale, shape, device)
    one = row_scale is not None and len(row_scale) == 1
    row_scale, column_scale = (None if x is None else x.contiguous() for x in (row_scale, column_scale))
    alpha, decay, grad_alpha = (on_device(device, x) for x in (alpha, decay, grad_alpha))
    options = tiles(None if left is None else left.dtype, rank, gradient=grad is not None)
    kernel[(cdiv(m, options["BLOCK_M"]) * cdiv(n, options["BLOCK_N"]),)](
        codes, scale, left, right, grad, row_scale, column_scale, *random, alpha, decay, grad_alpha, m, n,
        rank, *batch_strides("left", left)[1:], *batch_strides("right", right)[1:], *batch_strides("grad", grad)[1:],
        ONE_ROW_SCALE=one, **options,
    )  # fmt: skip


def launch_options(dtype: torch.dtype | None, rank: int, *, gradient: bool) -> dict[str, Any]:
    """Tiles, warps and stages.

    The values of a whole group stay in registers until its scale is known; 64 rows are the fewest of which
    the matrix units of an H100 take a product at their full rate. With a gradient only 32 rows fit on every chip.

    Args:
        dtype: of the operands, None for no product.
        rank: length of the sum.
        gradient: whether there is a gradient term.
    """
    options: dict[str, Any] = {"BLOCK_N": GROUP, "PRECISION": "tf32", "num_warps": 8, "num_stages": 4}
    options["BLOCK_K"] = min(32, max(16, power_of_2(rank)))
    if dtype is None:
        return {**options, "BLOCK_M": 4, "num_warps": 4}
    if dtype != torch.float32:
        return {**options, "BLOCK_M": 32 if gradient else 64}
    # Without tensor cores, unless torch allows TF32, the operands stand in registers too.
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    # With a gradient, a second stage or shorter steps spill 8 bytes with triton 3.6.
    return {**options, "BLOCK_M": 16, "num_stages": 1 if gradient else 2, "PRECISION": precision}


# Dtype of the operands, None for no product, and the scales of the gradient.
Kind: TypeAlias = tuple[torch.dtype | None, tuple[str, ...]]
KINDS: list[Kind] = [
    (torch.bfloat16, ()),
    (torch.bfloat16, ROWS),
    (torch.bfloat16, ROWS + COLUMNS),
    (None, ROWS),
    (None, COLUMNS),
    (torch.float32, ROWS),
]


def aot_cases() -> list[AotCase]:
    return cases_of("lowrank_update_int8", lowrank_update_int8_kernel, launch_options, "*i8", KINDS)


def cases_of(
    name: str, kernel: Any, tiles: Callable[..., dict[str, Any]], codes: str, kinds: Sequence[Kind]
) -> list[AotCase]:
    """What Q-GaLore, Fira and APOLLO launch on LLaMA's matrices."""
    cases = []
    for dtype, scales in kinds:
        constants = {**tiles(dtype, 256, gradient=bool(scales)), "ONE_ROW_SCALE": False}
        constants |= dict.fromkeys(("left_stride_k", "right_stride_k", "grad_stride_n"), 1)
        constants |= absent(dtype is not None, scales)
        types = {"codes_ptr": codes, **dict.fromkeys(("alpha", "decay", "grad_alpha"), "fp32")}
        pointer = "*fp32" if dtype == torch.float32 else "*bf16"
        types |= dict.fromkeys(("left_ptr", "right_ptr", "grad_ptr"), pointer)
        operands = "" if dtype is None else f" {dtype} product".replace("torch.", "")
        cases.append(aot_case(f"{name}{operands}{gradient(scales)}", kernel, types, constants))
    return cases
