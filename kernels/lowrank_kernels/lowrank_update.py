"""Triton twin of ``lowrank_optim.ops.lowrank_update``: one product whose tile of the result is a tile of the weight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels.rounding import join_24_bits, random_bits, round_to_bfloat16, round_to_nearest, split_24_bits
from lowrank_kernels.tiles import add_product, grouped_tile, tile_options


@triton.jit
def move(
    product, rows, columns, weight_ptr, grad_ptr, factor_ptr, correction_ptr, key, decay, m, n,
    weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n, factor_stride,
    FACTOR_BY_COLUMN: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """weight = decay weight + product + factor grad, for one tile."""
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
        grad = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        if FACTOR_BY_COLUMN:
            factor = tl.load(factor_ptr + columns * factor_stride, mask=columns < n, other=0.0)[None, :]
        else:
            factor = tl.load(factor_ptr + rows * factor_stride, mask=rows < m, other=0.0)[:, None]
        factor = factor.to(tl.float32)
        # Zero times NaN is NaN.
        value += tl.where(factor != 0, factor * grad, 0.0)

    if ROUNDING == "nearest":
        tl.store(weight, round_to_nearest(value, weight_ptr.dtype.element_ty), mask=mask)
    else:
        bits = random_bits(position, tl.zeros_like(product).to(tl.int32) + key)
        if ROUNDING == "stochastic":
            tl.store(weight, round_to_bfloat16(value, bits), mask=mask)
        else:
            high, correction = split_24_bits(value, bits)
            tl.store(weight, high, mask=mask)
            tl.store(correction_ptr + position, correction, mask=mask)


@triton.jit
def halves(tile):
    """The left and the right half of the columns of a tile."""
    parted = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parted, (0, 2, 1)))


@triton.jit(do_not_specialize=["key"])
def lowrank_update_kernel(
    weight_ptr,  # (m, n), modified in place
    left_ptr,  # (m, rank), dtype of the weight, or None
    right_ptr,  # (n, rank), likewise
    grad_ptr,  # (m, n), any floating dtype, or None
    factor_ptr,  # (m,) or (n,), or None
    correction_ptr,  # (m, n) int8, contiguous, modified in place, or None
    key,  # an int32, or a pointer to one
    alpha,  # a number, or a pointer to one
    decay,  # likewise
    m,
    n,
    rank,
    weight_stride_m,
    weight_stride_n,
    left_stride_m,
    left_stride_k,
    right_stride_n,
    right_stride_k,
    grad_stride_m,
    grad_stride_n,
    factor_stride,
    FACTOR_BY_COLUMN: tl.constexpr,
    ROUNDING: tl.constexpr,  # "nearest", "stochastic" or "compensated"
    KEY_ON_DEVICE: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    WIDE: tl.constexpr,  # 2^31 elements or more
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(m, n, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    if KEY_ON_DEVICE:
        key = tl.load(key)
    if ALPHA_ON_DEVICE:
        alpha = tl.load(alpha).to(tl.float32)
    if DECAY_ON_DEVICE:
        decay = tl.load(decay).to(tl.float32)

    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if left_ptr is None:
        move(
            product, rows, columns, weight_ptr, grad_ptr, factor_ptr, correction_ptr, key, decay, m, n,
            weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n, factor_stride,
            FACTOR_BY_COLUMN, ROUNDING, WIDE,
        )  # fmt: skip
    else:
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
        one, two = halves(product * alpha)
        quarters = halves(one) + halves(two)
        # A quarter at a time: with the operands of all its elements at once the tile would not fit into registers.
        for i in tl.static_range(4):
            columns = first + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            move(
                quarters[i], rows, columns, weight_ptr, grad_ptr, factor_ptr, correction_ptr, key, decay, m, n,
                weight_stride_m, weight_stride_n, grad_stride_m, grad_stride_n, factor_stride,
                FACTOR_BY_COLUMN, ROUNDING, WIDE,
            )  # fmt: skip


def lowrank_update_(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    factor: Tensor | None = None,
    key: int | Tensor | None = None,
    correction: Tensor | None = None,
) -> None:
    """See ``lowrank_optim.ops.lowrank_update``; real weights of at most 32 bits, computed in fp32.

    Raises:
        ValueError: a weight of another dtype, or a rounding that its dtype does not have.
    """
    rounds = key is not None or correction is not None
    dtypes = (torch.bfloat16,) if rounds else (torch.bfloat16, torch.float16, torch.float32)
    if weight.dtype not in dtypes:
        raise ValueError(f"Invalid weight: {weight.dtype}, expected {' or '.join(map(str, dtypes))}")
    if not weight.numel():
        return
    m, n = weight.shape
    rank = 0 if left is None else left.shape[1]
    left, right = (None if x is None else x.to(weight.dtype) for x in (left, right))
    alpha, decay = (on_device(weight.device, x) for x in (alpha, decay))
    by_column = factor is not None and factor.shape[0] == 1 and factor.shape[1] > 1
    factor_stride = 0 if factor is None or factor.numel() == 1 else factor.stride(1 if by_column else 0)
    options = launch_options(weight.dtype, rank)
    tiles = triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"])
    lowrank_update_kernel[(tiles,)](
        weight, left, right, grad, factor, correction, 0 if key is None else key, alpha, decay, m, n, rank,
        *weight.stride(), *strides(left), *strides(right), *strides(grad), factor_stride,
        FACTOR_BY_COLUMN=by_column,
        ROUNDING="compensated" if correction is not None else "stochastic" if rounds else "nearest",
        KEY_ON_DEVICE=isinstance(key, Tensor), ALPHA_ON_DEVICE=isinstance(alpha, Tensor),
        DECAY_ON_DEVICE=isinstance(decay, Tensor), WIDE=m * n >= 2**31, **options,
    )  # fmt: skip


def launch_options(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Tiles, warps and stages: those of a product, or where there is none, 8 elements a thread."""
    options = tile_options(dtype, rank)
    return options if rank else {**options, "BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4}


def on_device(device: torch.device, value: float | Tensor) -> float | Tensor:
    """A kernel reads a tensor on its own device; a learning rate on the CPU costs no synchronisation to read."""
    return float(value) if isinstance(value, Tensor) and value.device != device else value


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, object], dict[str, int]]]:
    """What GaLore, Fira and APOLLO launch on LLaMA's matrices: label, kernel, signature, constants, options."""
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    cases = []
    for dtype, product, scaled, rounding in [
        (torch.bfloat16, True, False, "nearest"),
        (torch.bfloat16, True, False, "stochastic"),
        (torch.bfloat16, True, True, "stochastic"),
        (torch.bfloat16, True, True, "compensated"),
        (torch.bfloat16, False, True, "stochastic"),
        (torch.float32, True, False, "nearest"),
        (torch.float32, True, True, "nearest"),
        (torch.float32, False, True, "nearest"),
    ]:
        options: dict[str, Any] = launch_options(dtype, 256 if product else 0)
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        flags = ("FACTOR_BY_COLUMN", "KEY_ON_DEVICE", "ALPHA_ON_DEVICE", "DECAY_ON_DEVICE", "WIDE")
        strides = ("weight_stride_n", "left_stride_k", "right_stride_k", "grad_stride_n", "factor_stride")
        constants: dict[str, object] = {**options, "ROUNDING": rounding}
        constants |= {**dict.fromkeys(flags, False), **dict.fromkeys(strides, 1)}
        if not product:
            constants |= {"left_ptr": None, "right_ptr": None}
        if not scaled:
            constants |= {"grad_ptr": None, "factor_ptr": None}
        if rounding != "compensated":
            constants["correction_ptr"] = None
        pointers = dict.fromkeys(("weight_ptr", "left_ptr", "right_ptr", "grad_ptr"), types[dtype])
        pointers |= {"factor_ptr": "*fp32", "correction_ptr": "*i8", "alpha": "fp32", "decay": "fp32"}
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32")
            for name in lowrank_update_kernel.arg_names
        }
        label = f"lowrank_update {dtype} {rounding}{' product' if product else ''}{' gradient' if scaled else ''}"
        cases.append((label.replace("torch.", ""), lowrank_update_kernel, signature, constants, launch))
    return cases
