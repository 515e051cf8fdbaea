"""``adam_direction`` and its application in one pass over memory, on the CPU by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

# beta^inf = 0: at this step the kernel's bias corrections are exactly 1, so that eps stands beside sqrt(V) itself.
_NEVER_CORRECTED = torch.tensor(float("inf"), dtype=torch.float32, device="cpu")


def fused_adam_fits(*tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors: fp32 or fp64 alike, of one shape, contiguous, on the CPU.

    The kernel itself looks at none of this and would read and write past the end of the shorter one.
    Not under ``torch.compile``, which fuses the eager operation itself.
    """
    return _misfit(*tensors) is None and not torch.compiler.is_compiling()


def _misfit(*tensors: Tensor) -> int | None:
    """Which one is the first that the kernel does not take beside the first."""
    shape, dtype, device = tensors[0].shape, tensors[0].dtype, tensors[0].device
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return 0
    # A loop: a generator takes three times as long, and this runs for every parameter in every step.
    for i, t in enumerate(tensors):
        if t.shape != shape or t.dtype != dtype or t.device != device or not t.is_contiguous():
            return i
    return None


def fused_adam_(
    target: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    *, beta1: float, beta2: float, eps: float, alpha: float = 1.0, replace: bool = False,
) -> None:  # fmt: skip
    """target += alpha * :func:`adam_direction`, both moments being updated in place, without a temporary.

    Args:
        target: what moves (modified in place), which may be ``grad`` itself.
        grad, exp_avg, exp_avg_sq: as in ``adam_direction``; :func:`fused_adam_fits` must hold for all four.
        alpha: any sign.
        replace: the direction takes the place of what ``target`` held, which must be finite; with alpha = 1.

    Raises:
        ValueError: a tensor that does not fit.
    """
    tensors = target, grad, exp_avg, exp_avg_sq
    wrong = _misfit(*tensors)
    if wrong is not None:
        name, t = ("target", "grad", "exp_avg", "exp_avg_sq")[wrong], tensors[wrong]
        raise ValueError(
            f"Invalid {name}: {tuple(t.shape)} {t.dtype} on {t.device}, expected contiguous {tuple(target.shape)} "
            f"{target.dtype}, fp32 or fp64, on the CPU"
        )
    # Decay takes lr weight_decay of the target away first: with -1 times -1 all of it.
    torch._fused_adamw_(
        [target], [grad], [exp_avg], [exp_avg_sq], [], [_NEVER_CORRECTED],
        lr=-alpha, beta1=beta1, beta2=beta2, weight_decay=-1.0 if replace else 0.0, eps=eps, amsgrad=False,
        maximize=False,
    )  # fmt: skip
