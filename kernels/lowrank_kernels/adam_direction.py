"""Triton twin of ``lowrank_optim.ops.adam_direction``: one pass, five reads and writes an element."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import all_finite, cdiv, check_operand, check_scalar, power_of_2, scalar
from lowrank_kernels.rounding import join_24_bits, random_bits, round_to_bfloat16, round_to_nearest, store_rounded

# Elementwise and bandwidth-bound: 1024 elements a program keep 4 warps at 8 values a thread.
BLOCK = 1024
# Programs that each look at all values of ``ok``, where these are the norms of all rows: 8 for each of 132 processors.
LOOKING = 1056

SCALARS = (torch.float32, torch.float64)
# The arguments of the kernels that are fp32.
NUMBERS = ("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "alpha", "decay")


@triton.jit
def adam(grad, exp_avg, exp_avg_sq, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """Both moments and the direction, fp32."""
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    return exp_avg, exp_avg_sq, tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + eps)


@triton.jit
def move_elements(
    weight_ptr, correction_ptr, offsets, mask, direction, alpha, decay, key, start, ROUNDING: tl.constexpr
):  # fmt: skip
    """weight = decay weight + alpha direction, for some elements."""
    value = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if ROUNDING == "compensated":
        value = join_24_bits(value, tl.load(correction_ptr + offsets, mask=mask, other=0))
    value = value.to(tl.float32) * decay + direction * alpha
    correction = weight_ptr + offsets if correction_ptr is None else correction_ptr + offsets
    store_rounded(weight_ptr + offsets, correction, value, start + offsets, key, mask, ROUNDING)


@triton.jit(do_not_specialize=["key", "key_sq", "key_weight", "start", "eps", "alpha", "decay"])
def adam_direction_kernel(
    grad_ptr,  # (rows, columns) R, any floating dtype
    exp_avg_ptr,  # (rows, columns) M, fp32 or bf16, modified in place
    exp_avg_sq_ptr,  # (rows, columns) V, likewise
    direction_ptr,  # (rows, columns) N, any floating dtype, or None
    norms_ptr,  # (2, rows) fp32, or None
    ok_ptr,  # (looked,) fp32, or None
    weight_ptr,  # (rows, columns) W, modified in place, in the place of N; or None
    correction_ptr,  # (rows, columns) int8, modified in place, or None
    key,  # of the random bits that round M: an int32, or a pointer to one
    key_sq,  # likewise for V
    key_weight,  # likewise for W
    start,  # position of the first element among all that share the keys
    looked,
    rows,
    columns,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,  # a number, or a pointer to one
    alpha,  # likewise
    decay,  # likewise
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    eps = scalar(eps, tl.float32)
    key, key_sq = scalar(key, tl.int32), scalar(key_sq, tl.int32)
    alpha = scalar(alpha, tl.float32)
    decay = scalar(decay, tl.float32)
    key_weight = scalar(key_weight, tl.int32)
    if ok_ptr is not None:
        ok = all_finite(ok_ptr, looked)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        # int64: a 7B embedding has 1.3e8 elements, a larger vocabulary passes 2^31.
        row = (tl.zeros((ROWS,), dtype=tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        low_squares = tl.zeros((ROWS,), dtype=tl.float32)
        direction_squares = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            offsets = row[:, None] * columns + column[None, :]
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if ok_ptr is not None:
                grad = tl.where(ok, grad, 0.0)
            if weight_ptr is not None:
                grad = tl.where(tl.abs(grad) < float("inf"), grad, 0.0)
            exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            exp_avg, exp_avg_sq, direction = adam(
                grad, exp_avg, exp_avg_sq, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
            )
            if weight_ptr is None:
                narrow = round_to_nearest(direction, direction_ptr.dtype.element_ty)
                tl.store(direction_ptr + offsets, narrow, mask=mask)
            else:
                move_elements(
                    weight_ptr, correction_ptr, offsets, mask, direction, alpha, decay, key_weight, start, ROUNDING
                )
            if exp_avg_ptr.dtype.element_ty == tl.bfloat16:
                none = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
                exp_avg = round_to_bfloat16(exp_avg, random_bits(start + offsets, none + key))
                exp_avg_sq = round_to_bfloat16(exp_avg_sq, random_bits(start + offsets, none + key_sq))
            tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
            tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
            if norms_ptr is not None:
                low_squares += tl.sum(grad * grad, axis=1)
                # Past the end eps may be all there is to divide by.
                direction_squares += tl.sum(tl.where(mask, direction * direction, 0.0), axis=1)
        if norms_ptr is not None:
            tl.store(norms_ptr + row, tl.sqrt_rn(low_squares), mask=row < rows)
            tl.store(norms_ptr + rows + row, tl.sqrt_rn(direction_squares), mask=row < rows)


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float | Tensor,
    keys: tuple[int | Tensor, int | Tensor] | None = None, start: int = 0, norms: Tensor | None = None,
    ok: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See ``lowrank_optim.ops.adam_direction``; the moments must be contiguous, fp32 or with keys bfloat16.

    Raises:
        ValueError: tensors that do not fit the gradient, or moments of another dtype or layout.
    """
    check_moments(grad, exp_avg, exp_avg_sq, eps, keys)
    if norms is not None:
        check_operand("norms", norms, (2, *grad.shape[:-1]), grad.device, (torch.float32,))
    check_verdict(ok, grad.device)
    direction = torch.empty_like(exp_avg, dtype=torch.float32 if dtype is None else dtype)
    numel = exp_avg.numel()
    if not numel:
        return direction
    # Norms want rows; without them every element is one, so that no program is left with half a row.
    columns = 1 if norms is None else exp_avg.shape[-1]
    rows = numel // columns
    width = 1 if norms is None else min(256, power_of_2(columns))
    height = BLOCK // width
    programs = cdiv(rows, height)
    adam_direction_kernel[(min(programs, LOOKING) if norms is not None else programs,)](
        grad.contiguous(), exp_avg, exp_avg_sq, direction, norms, ok, None, None, *(keys or (0, 0)), 0, start,
        0 if ok is None else ok.numel(), rows, columns, beta1, beta2, 1 - beta1, 1 - beta2, eps, 1.0, 1.0,
        ROUNDING="nearest", ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return direction


def check_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, eps: float | Tensor,
    keys: tuple[int | Tensor, int | Tensor] | None,
) -> None:  # fmt: skip
    """Raise ValueError where moments do not fit the gradient, or are stored otherwise than ``keys`` say."""
    shape, device = grad.shape, grad.device
    stored = (torch.float32,) if keys is None else (torch.bfloat16,)
    check_operand("grad", grad, shape, device, contiguous=False)
    check_operand("exp_avg", exp_avg, shape, device, stored)
    check_operand("exp_avg_sq", exp_avg_sq, shape, device, stored)
    check_scalar("eps", eps, device, SCALARS)
    for key in keys or ():
        check_scalar("keys", key, device, (torch.int32,))
    if keys is not None and isinstance(keys[0], Tensor) != isinstance(keys[1], Tensor):
        raise ValueError(f"Invalid keys: {keys}, expected two numbers or two tensors")


def check_verdict(ok: Tensor | None, device: torch.device) -> None:
    """Raise ValueError where a verdict is not a contiguous fp32 tensor on the device."""
    if ok is not None:
        check_operand("ok", ok, ok.shape, device, (torch.float32,))


def aot_cases() -> list[AotCase]:
    """Low-rank gradients, with their norms too, and whole steps."""
    cases = []
    for label, grad, moment, direction, rounding in (
        ("adam_direction fp32, moments fp32", "fp32", "fp32", "bf16", None),
        ("adam_direction fp32, moments bf16", "fp32", "bf16", "bf16", None),
        ("adam_direction fp32, moments fp32, norms", "fp32", "fp32", "fp32", None),
        ("adam_update bf16, moments fp32", "bf16", "fp32", None, "nearest"),
        ("adam_update bf16, moments fp32, compensated", "bf16", "fp32", None, "compensated"),
        ("adam_update bf16, moments bf16, stochastic", "bf16", "bf16", None, "stochastic"),
        ("adam_update fp32, moments fp32", "fp32", "fp32", None, "nearest"),
    ):
        constants: dict[str, Any] = {"ROUNDING": rounding or "nearest"}
        if label.endswith("norms"):
            constants |= {"ROWS": BLOCK // 256, "COLUMNS": 256}
        else:
            constants |= {"ROWS": BLOCK, "COLUMNS": 1, "norms_ptr": None, "columns": 1}
        constants |= dict.fromkeys(("weight_ptr",) if rounding is None else ("direction_ptr", "ok_ptr"))
        if rounding != "compensated":
            constants["correction_ptr"] = None
        types = {"grad_ptr": f"*{grad}", "exp_avg_ptr": f"*{moment}", "exp_avg_sq_ptr": f"*{moment}"}
        types |= {"direction_ptr": f"*{direction}", "weight_ptr": f"*{grad}", "correction_ptr": "*i8"}
        types |= dict.fromkeys(NUMBERS, "fp32")
        cases.append(aot_case(label, adam_direction_kernel, types, constants))
    return cases
