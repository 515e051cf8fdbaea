"""Adam's moments and direction on a low-rank (or full) gradient."""

from __future__ import annotations

from torch import Tensor


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float | Tensor
) -> Tensor:
    """Update both moments in place and return Adam's direction before bias correction.

        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) |R|^2
        N = M / (sqrt(V) + eps)

    Args:
        grad: R, any shape and floating or complex dtype.
        exp_avg: M, shape of R, fp32 or wider (modified in place).
        exp_avg_sq: V, shape of R, real, fp32 or wider (modified in place).

    Returns:
        N, with the dtype of M.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    if grad.is_complex():
        exp_avg_sq.mul_(beta2).add_((grad * grad.conj()).real, alpha=1 - beta2)
    else:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return exp_avg / exp_avg_sq.sqrt().add_(eps)
