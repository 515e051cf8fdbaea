"""A whole step of Adam on a weight that is not compressed, its moments and its rounding in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.rounding import Positions, join_24_bits, round_to_bfloat16, split_24_bits


def adam_update_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None, *, beta1: float, beta2: float, eps: float | Tensor, alpha: float | Tensor,
    decay: float | Tensor = 1.0, keys: tuple[int | Tensor, int | Tensor] | None = None,
    key: int | Tensor | None = None, correction: Tensor | None = None, start: int | Positions = 0,
) -> None:  # fmt: skip
    """Move a weight and both moments, computing in fp32 and rounding once::

        G = grad, its values that are not finite replaced by zeros
        M = beta1 M + (1 - beta1) G
        V = beta2 V + (1 - beta2) G²
        W = decay W + alpha M / (sqrt(V) + eps)

    Args:
        weight: W, real, contiguous (modified in place).
        grad: G, shape of W.
        exp_avg, exp_avg_sq: M and V, contiguous (modified in place): fp32, bfloat16 with ``keys``, or with scales codes
            as :func:`lowrank_optim.ops.adam8bit_direction.adam8bit_direction` takes them.
        eps, alpha, decay: numbers or one-element tensors.
        keys: of the random bits that round bfloat16 moments.
        key, correction: how a bfloat16 weight is rounded, as for
            :func:`lowrank_optim.ops.lowrank_update.lowrank_update_`.
        start: position of the first element in the counter of the random bits, or of all; the kernel takes the first.
    """
    grad = grad.nan_to_num(0.0, 0.0, 0.0)
    if exp_avg_scale is None or exp_avg_sq_scale is None:
        direction = adam_direction(grad, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps, keys=keys, start=start)
    else:
        moments = exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale
        direction = adam8bit_direction(grad, *moments, beta1=beta1, beta2=beta2, eps=eps)
    value = weight if correction is None else join_24_bits(weight, correction)
    value = value.to(direction.dtype) * decay + direction * alpha
    if correction is not None:
        value, low = split_24_bits(value, 0 if key is None else key, start)
        correction.copy_(low)
    elif key is not None:
        value = round_to_bfloat16(value, key, start)
    weight.copy_(value)
