"""Triton twin of ``lowrank_optim.ops.adam8bit_direction``: moments are wide in registers only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import AotCase, aot_case
from lowrank_kernels._support import cdiv, check_operand, check_scalar, scalar
from lowrank_kernels.adam_direction import NUMBERS, SCALARS, adam, check_verdict, move_elements
from lowrank_kernels.rounding import round_to_nearest
from lowrank_optim.ops.blockwise import BLOCK, DECADES, GREATEST_SCALE, LEAST_SCALE, search_tables

# A warp a block, 8 values a thread: nothing but registers is shared.
LAUNCH: dict[str, Any] = {
    "BLOCK": BLOCK, "DECADES": DECADES, "LEAST_SCALE": LEAST_SCALE, "GREATEST_SCALE": GREATEST_SCALE, "num_warps": 1,
}  # fmt: skip


@triton.jit
def quantize(
    values, bounds_ptr, DECADES: tl.constexpr, LEAST_SCALE: tl.constexpr, GREATEST_SCALE: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """The codes of a block of fp32 values, and their scale: NaN where one of them is."""
    # As an integer a NaN is larger than any number.
    scale = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, tl.where(scale > GREATEST_SCALE, GREATEST_SCALE, scale))
    normal = values * tl.div_rn(1.0, scale)
    # How many codes lie below a magnitude is the least of a line for each decade, which has twice as many codes as the
    # decade before it and is a fifth as steep. From half a code less, cut off, the nearest is at most one away.
    first: tl.constexpr = 1.0 if SIGNED else 2.0
    slope, level = first * 10.0 ** (DECADES - 1) / 0.9, first * 0.8 / 0.9
    code = tl.full(values.shape, 127.0 if SIGNED else 254.0, tl.float32)
    for _ in tl.static_range(DECADES):
        code = tl.minimum(code, tl.abs(normal) * slope + (level - (first - 0.5)))
        slope, level = slope / 5, level * 2
    code = code.to(tl.int32)
    if SIGNED:
        code = tl.where(normal < 0, 126 - code, 127 + code)
    code = tl.maximum(code, 0)
    code += (normal > tl.load(bounds_ptr + code)).to(tl.int32)
    if not SIGNED:
        # A positive second moment never becomes zero.
        code = tl.maximum(code, (values > 0).to(tl.int32))
    return code.to(tl.uint8), scale


@triton.jit(do_not_specialize=["key_weight", "start", "eps", "alpha", "decay"])
def adam8bit_direction_kernel(
    grad_ptr,  # (n,) R, any floating dtype
    exp_avg_ptr,  # (n,) codes of M, modified in place
    exp_avg_scale_ptr,  # (ceil(n / 256),) likewise
    exp_avg_sq_ptr,  # (n,) codes of V, likewise
    exp_avg_sq_scale_ptr,  # (ceil(n / 256),) likewise
    direction_ptr,  # (n,) N, any floating dtype, or None
    ok_ptr,  # a number, or None
    weight_ptr,  # (n,) W, modified in place, in the place of N; or None
    correction_ptr,  # (n,) int8, modified in place, or None
    signed_map_ptr,  # (256,) the values of codes
    signed_bounds_ptr,  # (256,)
    unsigned_map_ptr,
    unsigned_bounds_ptr,
    key_weight,  # of the random bits that round W: an int32, or a pointer to one
    start,  # position of the first element among all that share the key
    n,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,  # a number, or a pointer to one
    alpha,  # likewise
    decay,  # likewise
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    DECADES: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    GREATEST_SCALE: tl.constexpr,
):
    eps = scalar(eps, tl.float32)
    alpha = scalar(alpha, tl.float32)
    decay = scalar(decay, tl.float32)
    key_weight = scalar(key_weight, tl.int32)
    # int64: a 7B embedding has 1.3e8 elements, a larger vocabulary passes 2^31.
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    exp_avg_scale_ptr += block
    exp_avg_sq_scale_ptr += block
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ok_ptr is not None:
        grad = tl.where(tl.abs(tl.load(ok_ptr)) < float("inf"), grad, 0.0)
    if weight_ptr is not None:
        grad = tl.where(tl.abs(grad) < float("inf"), grad, 0.0)
    code = tl.load(exp_avg_ptr + offsets, mask=mask, other=0).to(tl.int32)
    exp_avg = tl.load(signed_map_ptr + code) * tl.load(exp_avg_scale_ptr)
    code = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0).to(tl.int32)
    exp_avg_sq = tl.load(unsigned_map_ptr + code) * tl.load(exp_avg_sq_scale_ptr)
    exp_avg, exp_avg_sq, direction = adam(
        grad, exp_avg, exp_avg_sq, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
    )
    if weight_ptr is None:
        tl.store(direction_ptr + offsets, round_to_nearest(direction, direction_ptr.dtype.element_ty), mask=mask)
    else:
        move_elements(weight_ptr, correction_ptr, offsets, mask, direction, alpha, decay, key_weight, start, ROUNDING)
    # A last block that is not full must not get its scale from what is past the end.
    exp_avg = tl.where(mask, exp_avg, 0.0)
    code, scale = quantize(exp_avg, signed_bounds_ptr, DECADES, LEAST_SCALE, GREATEST_SCALE, SIGNED=True)
    tl.store(exp_avg_ptr + offsets, code, mask=mask)
    tl.store(exp_avg_scale_ptr, scale)
    exp_avg_sq = tl.where(mask, exp_avg_sq, 0.0)
    code, scale = quantize(exp_avg_sq, unsigned_bounds_ptr, DECADES, LEAST_SCALE, GREATEST_SCALE, SIGNED=False)
    tl.store(exp_avg_sq_ptr + offsets, code, mask=mask)
    tl.store(exp_avg_sq_scale_ptr, scale)


def adam8bit_direction(
    grad: Tensor, exp_avg_codes: Tensor, exp_avg_scale: Tensor, exp_avg_sq_codes: Tensor, exp_avg_sq_scale: Tensor,
    *, beta1: float, beta2: float, eps: float | Tensor, norms: Tensor | None = None, ok: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See ``lowrank_optim.ops.adam8bit_direction``; computed in fp32.

    Raises:
        ValueError: tensors that do not fit the gradient, or moments that are not contiguous.
    """
    shape, device, n = grad.shape, grad.device, grad.numel()
    check_codes(grad, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    check_scalar("eps", eps, device, SCALARS)
    check_verdict(ok, device)
    if norms is not None:
        check_operand("norms", norms, (2, *shape[:-1]), device, (torch.float32,))
    if ok is not None and (norms is not None or ok.numel() > 1):
        # A gradient that counts as zeros has the norms of zeros.
        grad, ok = torch.where(ok.isfinite().all(), grad, 0), None
    direction = torch.empty(shape, dtype=torch.float32 if dtype is None else dtype, device=device)
    if n:
        tables = search_tables(device)
        adam8bit_direction_kernel[(cdiv(n, BLOCK),)](
            grad.contiguous(), exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale, direction, ok, None,
            None, *tables[True][:2], *tables[False][:2], 0, 0, n, beta1, beta2, 1 - beta1, 1 - beta2, eps, 1.0, 1.0,
            ROUNDING="nearest", **LAUNCH,
        )  # fmt: skip
    if norms is not None:
        # Not in the kernel: blocks do not end where rows do.
        for out, rows in zip(norms, (grad, direction)):
            torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32, out=out)
    return direction


def check_codes(
    grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor, exp_avg_sq: Tensor, exp_avg_sq_scale: Tensor
) -> None:
    """Raise ValueError where codes and scales are not those of moments of the gradient's shape."""
    shape, device, blocks = grad.shape, grad.device, (cdiv(grad.numel(), BLOCK),)
    check_operand("grad", grad, shape, device, contiguous=False)
    check_operand("exp_avg_codes", exp_avg, shape, device, (torch.uint8,))
    check_operand("exp_avg_scale", exp_avg_scale, blocks, device, (torch.float32,))
    check_operand("exp_avg_sq_codes", exp_avg_sq, shape, device, (torch.uint8,))
    check_operand("exp_avg_sq_scale", exp_avg_sq_scale, blocks, device, (torch.float32,))


def aot_cases() -> list[AotCase]:
    """Low-rank gradients and whole steps."""
    cases = []
    for label, grad, rounding in (
        ("adam8bit_direction fp32", "fp32", None),
        ("adam_update bf16, moments int8", "bf16", "nearest"),
        ("adam_update bf16, moments int8, stochastic", "bf16", "stochastic"),
    ):
        constants = {**LAUNCH, "ROUNDING": rounding or "nearest", "correction_ptr": None}
        constants |= dict.fromkeys(("weight_ptr",) if rounding is None else ("direction_ptr", "ok_ptr"))
        types = {"grad_ptr": f"*{grad}", "weight_ptr": f"*{grad}", "direction_ptr": "*bf16"}
        types |= {"exp_avg_ptr": "*u8", "exp_avg_sq_ptr": "*u8", **dict.fromkeys(NUMBERS, "fp32")}
        cases.append(aot_case(label, adam8bit_direction_kernel, types, constants))
    return cases
