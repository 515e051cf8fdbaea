"""The update of a weight by a product of two thin matrices and by its rescaled gradient, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import join_24_bits, round_to_bfloat16, split_24_bits


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
    """Move a weight once, computing in fp32 or wider::

        W = decay W + alpha left rightᵀ + factor ∘ grad

    Args:
        weight: W (m, n), real (modified in place).
        left, right: (m, rank) and (n, rank), one of them a basis; both None for no product. They enter in the weight's
            dtype, as matrix units take them.
        alpha, decay: numbers or one-element tensors.
        grad, factor: (m, n) in the weight's layout, and (m, 1), (1, n) or (1, 1); both or neither. Where the factor is
            0 it does not matter what the gradient holds.
        key: round a bfloat16 weight stochastically with this key, see :func:`lowrank_optim.ops.rounding.random_bits`;
            None rounds to nearest. The counter is the position in a contiguous weight.
        correction: int8 (m, n), contiguous (modified in place): the weight is
            :func:`lowrank_optim.ops.rounding.join_24_bits` of the two; takes a key.
    """
    if correction is None:
        value = weight.to(torch.promote_types(weight.dtype, torch.float32), memory_format=torch.contiguous_format)
    else:
        value = join_24_bits(weight.contiguous(), correction)
    value.mul_(decay)
    if left is not None and right is not None:
        left, right = (factor.to(weight.dtype).to(value.dtype) for factor in (left, right))
        value.addmm_(left * alpha, right.mT)
    if grad is not None and factor is not None:
        value.addcmul_(torch.where(factor != 0, grad, 0).to(value.dtype), factor.to(value.dtype))
    if value is weight:
        return
    if correction is not None:
        high, low = split_24_bits(value, key or 0)
        correction.copy_(low)
    else:
        high = value if key is None else round_to_bfloat16(value, key)
    weight.copy_(high)
