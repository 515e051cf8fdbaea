"""``adam_direction`` on moments in blockwise 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.blockwise import dequantize, quantize_


def adam8bit_direction(
    grad: Tensor, exp_avg_codes: Tensor, exp_avg_scale: Tensor, exp_avg_sq_codes: Tensor, exp_avg_sq_scale: Tensor,
    *, beta1: float, beta2: float, eps: float | Tensor, norms: Tensor | None = None, ok: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Update both moments in place and return Adam's direction before bias correction.

    Args:
        grad: R, any shape and real floating dtype.
        exp_avg_codes, exp_avg_scale: M in the signed format of :mod:`lowrank_optim.ops.blockwise` (modified in place).
        exp_avg_sq_codes, exp_avg_sq_scale: V in the unsigned one (modified in place).
        eps, norms, ok, dtype: as for :func:`lowrank_optim.ops.adam_direction.adam_direction`.

    Returns:
        N, fp32 without ``dtype``, of the moments before they are rounded to codes.
    """
    exp_avg = dequantize(exp_avg_codes, exp_avg_scale, signed=True)
    exp_avg_sq = dequantize(exp_avg_sq_codes, exp_avg_sq_scale, signed=False)
    direction = adam_direction(
        grad, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps, norms=norms, ok=ok, dtype=dtype
    )
    quantize_(exp_avg_codes, exp_avg_scale, exp_avg, signed=True)
    quantize_(exp_avg_sq_codes, exp_avg_sq_scale, exp_avg_sq, signed=False)
    return direction
