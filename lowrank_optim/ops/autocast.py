"""Autocast for operations that are autograd functions of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which ``torch.nn.functional.linear`` would take ``weight`` here: autocast's, or its own.

    An autograd function has to ask: casting the factors before calling it would keep the cast copies until
    the backward pass.
    """
    device = weight.device.type
    # There is no autocast for meta tensors, and it leaves fp64 alone.
    known = weight.dtype != torch.float64 and device != "meta"
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else weight.dtype
