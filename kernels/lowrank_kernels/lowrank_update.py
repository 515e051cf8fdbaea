"""Triton twin of ``lowrank_optim.ops.lowrank_update``: one product whose tile of the result is a tile of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import batch_strides, cdiv, check_operand, check_scales, scalar
from lowrank_kernels.rounding import join_24_bits, store_rounded
from lowrank_kernels.tiles import grouped_tile, rescaled, tile_options, tile_product
from lowrank_optim.ops.chunks import cast
from lowrank_optim.ops.rounding import Positions, wrap

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Values of 16 bits in 16 bytes, the longest load.
UNIT = 8


@triton.jit
def move(
    product, rows, columns, weight_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, correction_ptr, key, start, skip,
    decay, grad_alpha, m, n, weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n,
    ONE_ROW_SCALE: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """weight = decay weight + product + grad_alpha row_scale grad column_scale, for one tile."""
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    position = rows[:, None] * n + columns[None, :]
    weight = weight_ptr + rows[:, None] * weight_stride_m + columns[None, :] * weight_stride_n
    value = tl.load(weight, mask=mask, other=0.0)
    if ROUNDING == "compensated":
        value = join_24_bits(value, tl.load(correction_ptr + position, mask=mask, other=0))
    value = value.to(tl.float32) * decay + product

    if grad_ptr is not None:
        grad = grad_ptr + rows[:, None] * grad_stride_m + columns[None, :] * grad_stride_n
        grad = tl.load(grad, mask=mask, other=0.0)
        value += grad_alpha * rescaled(grad, rows, columns, row_scale_ptr, column_scale_ptr, m, n, ONE_ROW_SCALE)

    correction = weight if correction_ptr is None else correction_ptr + position
    position += start
    if skip is not None:
        position += rows[:, None] * skip
    store_rounded(weight, correction, value, position, key, mask, ROUNDING)


@triton.jit
def halves(tile):
    """The left and the right half of the columns of a tile."""
    parted = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parted, (0, 2, 1)))


@triton.jit(do_not_specialize=["key", "alpha", "decay", "grad_alpha", "start", "step"])
def lowrank_update_kernel(
    weight_ptr,  # (matrices, m, n), modified in place
    left_ptr,  # (matrices, m, rank), dtype of the weight, or None
    right_ptr,  # (matrices, n, rank), likewise
    grad_ptr,  # (matrices, m, n), any floating dtype, or None
    row_scale_ptr,  # (matrices, m) or (matrices,), contiguous, or None
    column_scale_ptr,  # (matrices, n), contiguous, or None
    correction_ptr,  # (matrices, m, n) int8, contiguous, modified in place, or None
    key,  # an int32, or a pointer to one
    alpha,  # a number, or a pointer to one
    decay,  # likewise
    grad_alpha,  # likewise
    start,  # position of the first element in the counter of the random bits
    step,  # from one matrix to the next in it
    skip,  # elements of other parts between two rows, or None
    m,
    n,  # in UNITs
    rank,
    weight_stride_e,
    weight_stride_m,  # in UNITs
    weight_stride_n,
    left_stride_e,
    left_stride_m,
    left_stride_k,
    right_stride_e,
    right_stride_n,
    right_stride_k,
    grad_stride_e,
    grad_stride_m,  # in UNITs
    grad_stride_n,
    ONE_ROW_SCALE: tl.constexpr,  # one number a matrix
    ROUNDING: tl.constexpr,  # "nearest", "stochastic" or "compensated"
    WIDE: tl.constexpr,  # 2^31 elements or more in a matrix
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # What is divisible by 8 and not by 16 would count as odd, and be loaded value by value.
    n *= UNIT
    weight_stride_m *= UNIT
    grad_stride_m *= UNIT
    matrix = tl.program_id(1).to(tl.int64)
    weight_ptr += matrix * weight_stride_e
    if grad_ptr is not None:
        grad_ptr += matrix * grad_stride_e
        if row_scale_ptr is not None:
            row_scale_ptr += matrix if ONE_ROW_SCALE else matrix * m
        if column_scale_ptr is not None:
            column_scale_ptr += matrix * n
    if correction_ptr is not None:
        correction_ptr += matrix * m * n
    # The counter of the random bits has 32.
    start += (matrix * step).to(tl.int32)
    tile_m, tile_n = grouped_tile(m, n, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    key = scalar(key, tl.int32)
    alpha = scalar(alpha, tl.float32)
    decay = scalar(decay, tl.float32)
    grad_alpha = scalar(grad_alpha, tl.float32)

    if left_ptr is not None:
        left_ptr += matrix * left_stride_e
        right_ptr += matrix * right_stride_e
    product = tile_product(
        left_ptr, right_ptr, rows, columns, m, n, rank, left_stride_m, left_stride_k, right_stride_n, right_stride_k,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    if left_ptr is None:
        move(
            product, rows, columns, weight_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, correction_ptr, key, start,
            skip, decay, grad_alpha, m, n, weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n,
            ONE_ROW_SCALE, ROUNDING, WIDE,
        )  # fmt: skip
    else:
        one, two = halves(product * alpha)
        quarters = halves(one) + halves(two)
        # A quarter at a time: with the operands of all its elements at once the tile would not fit into registers.
        for i in tl.static_range(4):
            columns = first + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            move(
                quarters[i], rows, columns, weight_ptr, grad_ptr, row_scale_ptr, column_scale_ptr, correction_ptr, key,
                start, skip, decay, grad_alpha, m, n, weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n,
                ONE_ROW_SCALE, ROUNDING, WIDE,
            )  # fmt: skip


def lowrank_update_(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    grad_alpha: float | Tensor = 1.0,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    key: int | Tensor | None = None,
    correction: Tensor | None = None,
    start: int | Positions = 0,
) -> None:
    """See ``lowrank_optim.ops.lowrank_update``; real weights of at most 32 bits, computed in fp32.

    Raises:
        ValueError: a weight of another dtype, a rounding that its dtype does not have, or an operand of another shape,
            device or kind than the weight asks for.
    """
    rounds = key is not None or correction is not None
    shape, device = weight.shape, weight.device
    check_operand("weight", weight, shape, device, (torch.bfloat16,) if rounds else DTYPES, contiguous=False)
    if left is None or right is None:
        left = right = None
    if row_scale is None and column_scale is None:
        grad = None
    *batch, m, n = shape
    rank = 0
    if left is not None and right is not None:
        rank = left.shape[-1]
        check_operand("left", left, (*batch, m, rank), device, contiguous=False)
        check_operand("right", right, (*batch, n, rank), device, contiguous=False)
        left, right = cast(left, weight.dtype), cast(right, weight.dtype)
    check_operand("grad", grad, shape, device, contiguous=False)
    check_scales(row_scale, column_scale, shape, device)
    check_operand("correction", correction, shape, device, (torch.int8,))
    if not weight.numel():
        return
    one = row_scale is not None and row_scale.shape[-2] == 1
    row_scale = None if row_scale is None else row_scale.contiguous()
    column_scale = None if column_scale is None else column_scale.contiguous()
    alpha, decay, grad_alpha = on_device(device, alpha), on_device(device, decay), on_device(device, grad_alpha)
    options = launch_options(weight.dtype, rank)
    tiles = cdiv(m, options["BLOCK_M"]) * cdiv(n, options["BLOCK_N"])
    weight_strides, grad_strides = batch_strides("weight", weight), batch_strides("grad", grad)
    unit = 1 if (n | weight_strides[1] | grad_strides[1]) % UNIT else UNIT
    lowrank_update_kernel[(tiles, math.prod(batch))](
        weight, left, right, grad, row_scale, column_scale, correction, 0 if key is None else key, alpha, decay,
        grad_alpha, *counter(start, m, n), m, n // unit, rank, *in_units(weight_strides, unit),
        *batch_strides("left", left), *batch_strides("right", right), *in_units(grad_strides, unit), ONE_ROW_SCALE=one,
        ROUNDING="compensated" if correction is not None else "stochastic" if rounds else "nearest",
        WIDE=m * n >= 2**31, UNIT=unit, **options,
    )  # fmt: skip


def launch_options(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Tiles, warps and stages: those of a product, or where there is none, 8 elements a thread."""
    options = tile_options(dtype, rank)
    return options if rank else {**options, "BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4}


def on_device(device: torch.device, value: float | Tensor) -> float | Tensor:
    """A kernel reads a tensor on its own device; a learning rate on the CPU costs no synchronisation to read."""
    return float(value) if isinstance(value, Tensor) and value.device != device else value


def counter(start: int | Positions, m: int, n: int) -> tuple[int, int, int | None]:
    """Position of the first element, step from one matrix to the next, and what is skipped between two rows."""
    if not isinstance(start, Positions):
        return wrap(start), m * n, None
    if start.run % (m * n) == 0:
        return wrap(start.start), m * n + start.skip, None
    return wrap(start.start), m * (n + start.skip), start.skip


def in_units(strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Strides of a batch of matrices with that of its rows in units."""
    return strides[0], strides[1] // unit, strides[2]


def aot_cases() -> list[AotCase]:
    """What GaLore, Fira and APOLLO launch on LLaMA's matrices."""
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    cases = []
    for dtype, product, scales, rounding in [
        (torch.bfloat16, True, (), "nearest"),
        (torch.bfloat16, True, (), "stochastic"),
        (torch.bfloat16, True, ROWS, "stochastic"),
        (torch.bfloat16, True, COLUMNS, "stochastic"),
        (torch.bfloat16, True, ROWS, "compensated"),
        (torch.bfloat16, True, ROWS + COLUMNS, "compensated"),
        (torch.bfloat16, False, ROWS, "stochastic"),
        (torch.bfloat16, False, COLUMNS, "stochastic"),
        (torch.float32, True, (), "nearest"),
        (torch.float32, True, ROWS, "nearest"),
        (torch.float32, True, ROWS + COLUMNS, "nearest"),
        (torch.float32, False, ROWS, "nearest"),
    ]:
        constants = {**launch_options(dtype, 256 if product else 0), **absent(product, scales)}
        constants |= {"ROUNDING": rounding, "UNIT": 1, "ONE_ROW_SCALE": False, "WIDE": False, "skip": None}
        constants |= dict.fromkeys(("weight_stride_n", "left_stride_k", "right_stride_k", "grad_stride_n"), 1)
        if rounding != "compensated":
            constants["correction_ptr"] = None
        operands = dict.fromkeys(("weight_ptr", "left_ptr", "right_ptr", "grad_ptr"), types[dtype])
        operands |= {"correction_ptr": "*i8", **dict.fromkeys(("alpha", "decay", "grad_alpha"), "fp32")}
        label = f"lowrank_update {dtype} {rounding}{' product' if product else ''}{gradient(scales)}"
        cases.append(aot_case(label.replace("torch.", ""), lowrank_update_kernel, operands, constants))
    return cases


# Of a tall weight rows are scaled, of a wide one columns.
ROWS, COLUMNS = ("row_scale_ptr",), ("column_scale_ptr",)


def absent(product: bool, scales: tuple[str, ...]) -> dict[str, object]:
    """The pointers that a call without a product, or with only these scales of a gradient, does not have."""
    names = [] if product else ["left_ptr", "right_ptr"]
    names += [name for name in ROWS + COLUMNS if name not in scales]
    return dict.fromkeys([*names, *([] if scales else ["grad_ptr"])])


def gradient(scales: tuple[str, ...]) -> str:
    """What a label says of the gradient's scales."""
    words = " and ".join(name.removesuffix("_scale_ptr") for name in scales)
    return f" gradient by {words}" if scales else ""
