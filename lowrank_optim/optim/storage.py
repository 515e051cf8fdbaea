"""How a parameter is stored: the only place that knows ``weight_rounding``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import join_24_bits, round_to_bfloat16, split_24_bits
from lowrank_optim.optim.moments import rounding_key

WEIGHT_ROUNDINGS = ("nearest", "stochastic", "compensated")


def check_storable(param: Tensor, weight_rounding: str) -> None:
    """Raise ValueError where a parameter's dtype cannot be rounded as asked."""
    if weight_rounding != "nearest" and param.dtype == torch.float16:
        raise ValueError(
            f"Invalid weight_rounding: {weight_rounding!r} for a float16 parameter of shape {tuple(param.shape)}, "
            "expected 'nearest', or bfloat16 parameters"
        )


def init_storage(param: Tensor, state: dict[str, Any], weight_rounding: str) -> None:
    """Allocate what is kept beside a parameter and is not there yet, on the meta device too."""
    if weight_rounding == "compensated" and param.dtype == torch.bfloat16 and "weight_correction" not in state:
        state["weight_correction"] = torch.zeros_like(param, dtype=torch.int8, memory_format=torch.contiguous_format)


@contextmanager
def writable(param: Tensor, state: dict[str, Any], weight_rounding: str) -> Iterator[Tensor]:
    """The value of a parameter, for in-place updates that are written back at the end.

    - "nearest", and every parameter that is not bfloat16: the parameter itself, without a copy.
    - "stochastic": an fp32 copy, rounded once, up with the probability of the part that is cut off.
    - "compensated": an fp32 copy of the bfloat16 weight plus its int8 correction (``weight_correction``).
    """
    if weight_rounding == "nearest" or param.dtype != torch.bfloat16:
        yield param
        return
    start = state.get("start", 0)
    # Rounding reinterprets bits by position, so the copy is contiguous even where the parameter is not.
    if weight_rounding == "stochastic":
        value = param.to(torch.float32, memory_format=torch.contiguous_format)
        yield value
        param.copy_(round_to_bfloat16(value, rounding_key(state, "weight"), start))
        return
    # Unless it is there: the option may have been switched on in the middle of a run.
    init_storage(param, state, weight_rounding)
    value = join_24_bits(param.contiguous(), state["weight_correction"])
    yield value
    rounded, correction = split_24_bits(value, rounding_key(state, "weight"), start)
    param.copy_(rounded)
    state["weight_correction"].copy_(correction)
