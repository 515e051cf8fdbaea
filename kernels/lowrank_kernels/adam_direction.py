"""Triton twin of ``lowrank_optim.ops.adam_direction``: one pass, five reads and writes an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elementwise and bandwidth-bound: 1024 elements a program keep 4 warps at 8 values a thread.
BLOCK = 1024


@triton.jit
def adam_direction_kernel(
    grad_ptr,  # (n,) R, any floating dtype
    exp_avg_ptr,  # (n,) M, fp32, modified in place
    exp_avg_sq_ptr,  # (n,) V, fp32, modified in place
    direction_ptr,  # (n,) N, fp32
    n,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    BLOCK: tl.constexpr,
):
    # int64: a 7B embedding has 1.3e8 elements, a larger vocabulary passes 2^31.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    direction = tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq) + eps)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    tl.store(direction_ptr + offsets, direction, mask=mask)


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """See ``lowrank_optim.ops.adam_direction``; the moments must be contiguous fp32.

    Raises:
        ValueError: moments of another dtype or layout.
    """
    if exp_avg.dtype != torch.float32 or not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        raise ValueError(f"Invalid moments: {exp_avg.dtype}, expected contiguous torch.float32")
    direction = torch.empty_like(exp_avg)
    n = exp_avg.numel()
    if n:
        adam_direction_kernel[(triton.cdiv(n, BLOCK),)](
            grad.contiguous(), exp_avg, exp_avg_sq, direction, n,
            beta1, beta2, 1 - beta1, 1 - beta2, eps, BLOCK=BLOCK,
        )  # fmt: skip
    return direction


def aot_cases():
    signature = dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr", "direction_ptr"), "*fp32") | {"n": "i32"}
    signature |= dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32")
    return [
        (
            f"adam_direction {dtype}",
            adam_direction_kernel,
            {"grad_ptr": f"*{dtype}", **signature, "BLOCK": "constexpr"},
            {"BLOCK": BLOCK},
            {},
        )
        for dtype in ("fp32", "bf16")
    ]
