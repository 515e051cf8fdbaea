"""The update of an int8 weight by a product of two thin matrices and by its rescaled gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.int8_weight import dequantize_int8_weight, quantize_int8_weight_


def lowrank_update_int8_(
    codes: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    factor: Tensor | None = None,
    key: int | Tensor,
) -> None:
    """Move a weight once, computing in fp32, and round it stochastically to codes of new scales::

        W = decay W + alpha left rightᵀ + factor ∘ grad

    Args:
        codes, scale: W (m, n) as :mod:`lowrank_optim.ops.int8_weight` stores it (modified in place).
        left, right: (m, rank) and (n, rank), one of them a basis; both None for no product.
        alpha, decay: numbers or one-element tensors.
        grad, factor: (m, n), and (m, 1), (1, n) or (1, 1); both or neither. Where the factor is 0 it does not matter
            what the gradient holds.
        key: of the random bits, see :func:`lowrank_optim.ops.rounding.random_bits`.
    """
    value = dequantize_int8_weight(codes, scale, torch.float32).mul_(decay)
    if left is not None and right is not None:
        value.addmm_(left.float() * alpha, right.float().mT)
    if grad is not None and factor is not None:
        value.addcmul_(torch.where(factor != 0, grad, 0).float(), factor.float())
    quantize_int8_weight_(codes, scale, value, key)
