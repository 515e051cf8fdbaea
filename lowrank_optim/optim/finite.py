"""What a non-finite gradient does: it counts as missing. This is the whole policy.

The CPU looks at every gradient and leaves the update out. Elsewhere, and under ``torch.compile``, a look would make the
host wait; the verdict stays on the device, where it replaces the low-rank gradient by zeros and keeps long-lived state
as it was. A refresh looks on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def host_looks(device: torch.device) -> bool:
    """Whether the host may read a value of a tensor in every step."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def verdict(tensor: Tensor) -> bool | Tensor:
    """Whether all values are finite: a bool where the host looks, else a 0-d bool tensor.

    NaN and infinity both survive summation.
    """
    total = tensor.sum(dtype=torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None)
    finite = total.isfinite()
    return bool(finite) if host_looks(tensor.device) else finite


def zero_unless(ok: bool | Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or zeros of its shape where it is not ``ok``."""
    return torch.where(ok, tensor, 0) if isinstance(ok, Tensor) else tensor
