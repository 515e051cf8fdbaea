"""Adam's moments and direction on a low-rank (or full) gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import Positions, round_to_bfloat16


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float | Tensor,
    keys: tuple[int | Tensor, int | Tensor] | None = None, start: int | Positions = 0, norms: Tensor | None = None,
    ok: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Update both moments in place and return Adam's direction before bias correction.

        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) |R|^2
        N = M / (sqrt(V) + eps)

    Args:
        grad: R, any shape and floating or complex dtype.
        exp_avg: M, shape of R, fp32 or wider (modified in place).
        exp_avg_sq: V, shape of R, real, fp32 or wider (modified in place).
        eps: a number or a 0-d tensor.
        keys: of the random bits that round bfloat16 moments, M's and V's; the arithmetic is fp32.
        start: position of the first element in the counter of the random bits, or of all; the kernel takes the first.
        norms: fp32 (2, rows), where the norms of the rows of R and of N are wanted (overwritten).
        ok: fp32, any shape: where one of its values is not finite, R counts as zeros.
        dtype: of N.

    Returns:
        N, without ``dtype`` in that of M, fp32 for bfloat16.
    """
    if ok is not None:
        grad = torch.where(ok.isfinite().all(), grad, 0)
    if keys is not None:
        wide = exp_avg.to(torch.float32), exp_avg_sq.to(torch.float32)
        direction = adam_direction(grad, *wide, beta1=beta1, beta2=beta2, eps=eps, norms=norms, dtype=dtype)
        for moment, value, key in zip((exp_avg, exp_avg_sq), wide, keys):
            moment.copy_(round_to_bfloat16(value, key, start))
        return direction
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    if grad.is_complex():
        exp_avg_sq.mul_(beta2).add_((grad * grad.conj()).real, alpha=1 - beta2)
    else:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    direction = exp_avg / exp_avg_sq.sqrt().add_(eps)
    if norms is not None:
        norms.copy_(torch.stack([torch.linalg.vector_norm(rows, dim=-1) for rows in (grad, direction)]))
    return direction if dtype is None else direction.to(dtype)
