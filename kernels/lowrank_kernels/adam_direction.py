"""Triton twin of ``lowrank_optim.ops.adam_direction``: one pass, five reads and writes an element."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._support import check_operand, check_scalar
from lowrank_kernels.rounding import random_bits, round_to_bfloat16

# Elementwise and bandwidth-bound: 1024 elements a program keep 4 warps at 8 values a thread.
BLOCK = 1024

SCALARS = (torch.float32, torch.float64)


@triton.jit
def adam(grad, exp_avg, exp_avg_sq, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """Both moments and the direction, fp32."""
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    return exp_avg, exp_avg_sq, tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + eps)


@triton.jit(do_not_specialize=["key", "key_sq", "start"])
def adam_direction_kernel(
    grad_ptr,  # (rows, columns) R, any floating dtype
    exp_avg_ptr,  # (rows, columns) M, fp32 or bf16, modified in place
    exp_avg_sq_ptr,  # (rows, columns) V, likewise
    direction_ptr,  # (rows, columns) N, fp32
    norms_ptr,  # (2, rows) fp32, or None
    key,  # of the random bits that round M: an int32, or a pointer to one
    key_sq,  # likewise for V
    start,  # position of the first element among all that share the keys
    rows,
    columns,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,  # a number, or a pointer to one
    EPS_ON_DEVICE: tl.constexpr,
    KEYS_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if EPS_ON_DEVICE:
        eps = tl.load(eps).to(tl.float32)
    if KEYS_ON_DEVICE:
        key, key_sq = tl.load(key), tl.load(key_sq)
    # int64: a 7B embedding has 1.3e8 elements, a larger vocabulary passes 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    low_squares = tl.zeros((ROWS,), dtype=tl.float32)
    direction_squares = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        offsets = row[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg, exp_avg_sq, direction = adam(
            grad, exp_avg, exp_avg_sq, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        tl.store(direction_ptr + offsets, direction, mask=mask)
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
) -> Tensor:  # fmt: skip
    """See ``lowrank_optim.ops.adam_direction``; the moments must be contiguous, fp32 or with keys bfloat16.

    Raises:
        ValueError: tensors that do not fit the gradient, or moments of another dtype or layout.
    """
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
    if norms is not None:
        check_operand("norms", norms, (2, *shape[:-1]), device, (torch.float32,))
    direction = torch.empty_like(exp_avg, dtype=torch.float32)
    if not exp_avg.numel():
        return direction
    # Norms want rows; without them every element is one, so that no program is left with half a row.
    columns = 1 if norms is None else exp_avg.shape[-1]
    rows = exp_avg.numel() // columns
    width = min(256, triton.next_power_of_2(columns))
    height = BLOCK // width
    adam_direction_kernel[(triton.cdiv(rows, height),)](
        grad.contiguous(), exp_avg, exp_avg_sq, direction, norms, *(keys or (0, 0)), start, rows, columns,
        beta1, beta2, 1 - beta1, 1 - beta2, eps, EPS_ON_DEVICE=isinstance(eps, Tensor),
        KEYS_ON_DEVICE=keys is not None and isinstance(keys[0], Tensor), ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return direction


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, object], dict[str, int]]]:
    """Full-rank parameters, and low-rank gradients with their norms: label, kernel, signature, constants, options."""
    cases: list[tuple[str, Any, dict[str, str], dict[str, object], dict[str, int]]] = []
    for grad, moment, measured in (("fp32", "fp32", 0), ("bf16", "fp32", 0), ("bf16", "bf16", 0), ("fp32", "fp32", 1)):
        constants: dict[str, object] = {"EPS_ON_DEVICE": False, "KEYS_ON_DEVICE": False, "ROWS": BLOCK, "COLUMNS": 1}
        constants |= {"ROWS": BLOCK // 256, "COLUMNS": 256} if measured else {"norms_ptr": None, "columns": 1}
        types = {"grad_ptr": f"*{grad}", "exp_avg_ptr": f"*{moment}", "exp_avg_sq_ptr": f"*{moment}"}
        types |= dict.fromkeys(("direction_ptr", "norms_ptr"), "*fp32")
        types |= dict.fromkeys(("key", "key_sq", "start", "rows", "columns"), "i32")
        signature = {
            name: "constexpr" if name in constants else types.get(name, "fp32")
            for name in adam_direction_kernel.arg_names
        }
        label = f"adam_direction {grad}, moments {moment}{', norms' if measured else ''}"
        cases.append((label, adam_direction_kernel, signature, constants, {}))
    return cases
