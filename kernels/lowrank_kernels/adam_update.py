"""Triton twin of ``lowrank_optim.ops.adam_update``: the kernels of Adam's direction move the weight themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_kernels._support import cdiv, check_operand, check_scalar
from lowrank_kernels.adam8bit_direction import LAUNCH, adam8bit_direction_kernel, check_codes
from lowrank_kernels.adam_direction import BLOCK, SCALARS, adam_direction_kernel, check_moments
from lowrank_kernels.lowrank_update import DTYPES, on_device
from lowrank_optim.ops.blockwise import BLOCK as QUANTIZED
from lowrank_optim.ops.blockwise import search_tables


def adam_update_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None, *, beta1: float, beta2: float, eps: float | Tensor, alpha: float | Tensor,
    decay: float | Tensor = 1.0, keys: tuple[int | Tensor, int | Tensor] | None = None,
    key: int | Tensor | None = None, correction: Tensor | None = None, start: int = 0,
) -> None:  # fmt: skip
    """See ``lowrank_optim.ops.adam_update``; weights of at most 32 bits, computed in fp32.

    Raises:
        ValueError: a tensor that does not fit the weight, or a rounding that its dtype does not have.
    """
    rounds = key is not None or correction is not None
    shape, device, n = weight.shape, weight.device, weight.numel()
    check_operand("weight", weight, shape, device, (torch.bfloat16,) if rounds else DTYPES)
    check_operand("grad", grad, shape, device, contiguous=False)
    check_operand("correction", correction, shape, device, (torch.int8,))
    check_scalar("key", key, device, (torch.int32,))
    alpha, decay = (on_device(device, x) for x in (alpha, decay))
    rounding = "compensated" if correction is not None else "stochastic" if rounds else "nearest"
    numbers = beta1, beta2, 1 - beta1, 1 - beta2, eps, alpha, decay
    word = 0 if key is None else key
    if exp_avg_scale is None or exp_avg_sq_scale is None:
        check_moments(grad, exp_avg, exp_avg_sq, eps, keys)
        if n:
            adam_direction_kernel[(cdiv(n, BLOCK),)](
                grad.contiguous(), exp_avg, exp_avg_sq, None, None, None, weight, correction, *(keys or (0, 0)), word,
                start, 0, n, 1, *numbers, ROUNDING=rounding, ROWS=BLOCK, COLUMNS=1,
            )  # fmt: skip
        return
    check_codes(grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
    check_scalar("eps", eps, device, SCALARS)
    if n:
        tables = search_tables(device)
        adam8bit_direction_kernel[(cdiv(n, QUANTIZED),)](
            grad.contiguous(), exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, None, None, weight, correction,
            *tables[True][:2], *tables[False][:2], word, start, n, *numbers, ROUNDING=rounding,
            **LAUNCH,
        )  # fmt: skip


def aot_cases() -> list[object]:
    """None: the cases stand beside the kernels."""
    return []
