"""What a non-finite gradient does: it counts as missing. This is the whole policy.

The CPU looks at every gradient and leaves the update out. Elsewhere, and under ``torch.compile``, a look would make the
host wait; the verdict stays on the device, where it replaces the low-rank gradient by zeros and keeps long-lived state
as it was; of a gradient that is not compressed, and whose elements are updated each for itself, the values that are not
finite count as zeros. A refresh looks on every device.
"""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor


def host_looks(device: torch.device) -> bool:
    """Whether the host may read a value of a tensor in every step."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def verdict(tensor: Tensor) -> bool | Tensor:
    """Whether all values are finite: a bool where the host looks, else a tensor that :func:`is_finite` reads.

    NaN and infinity both survive summation.
    """
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if not host_looks(tensor.device):
        return tensor.sum(dtype=dtype)
    if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous():
        # BLAS reads it twice as fast. Squares of finite values may overflow, which the sum decides.
        flat = tensor.view(-1)
        if math.isfinite(torch.dot(flat, flat).item()):
            return True
    return cmath.isfinite(tensor.sum(dtype=dtype).item())


def is_finite(ok: Tensor) -> Tensor:
    """A verdict of the device as a 0-d bool: whether all of its values are finite."""
    finite = ok.isfinite()
    return finite.all() if finite.ndim else finite


def finite_values(tensor: Tensor) -> Tensor:
    """The tensor, where the host does not look with zeros in the place of values that are not finite."""
    return tensor if host_looks(tensor.device) else tensor.nan_to_num(0.0, 0.0, 0.0)


def zero_unless(ok: bool | Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or zeros of its shape where it is not ``ok``."""
    return torch.where(is_finite(ok), tensor, 0) if isinstance(ok, Tensor) else tensor
