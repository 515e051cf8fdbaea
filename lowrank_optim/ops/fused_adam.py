"""``adam_direction`` and its application in one pass over memory, on the CPU by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

# beta^inf = 0: at this step the kernel's bias corrections are exactly 1, so that eps stands beside sqrt(V) itself.
_NEVER_CORRECTED = torch.tensor(float("inf"))


def fused_adam_fits(*tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors: fp32 or fp64 alike, contiguous, on the CPU.

    Not under ``torch.compile``, which fuses the eager operation itself.
    """
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and all(t.dtype == first.dtype and t.is_contiguous() for t in tensors)
        and not torch.compiler.is_compiling()
    )


def fused_adam_(
    target: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    *, beta1: float, beta2: float, eps: float, alpha: float,
) -> None:  # fmt: skip
    """target += alpha * :func:`adam_direction`, both moments being updated in place, without a temporary.

    Args:
        target: what moves, a weight or zeros (modified in place).
        grad, exp_avg, exp_avg_sq: as in ``adam_direction``; :func:`fused_adam_fits` must hold for all four.
        alpha: any sign.
    """
    torch._fused_adamw_(
        [target], [grad], [exp_avg], [exp_avg_sq], [], [_NEVER_CORRECTED],
        lr=-alpha, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
