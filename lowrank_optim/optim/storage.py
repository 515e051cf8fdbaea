"""How a parameter is stored: the only place that knows ``weight_rounding`` and int8 weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.int8_weight import dequantize_int8_weight, quantize_int8_weight_
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.lowrank_update_int8 import lowrank_update_int8_
from lowrank_optim.ops.rounding import join_24_bits, round_to_bfloat16, split_24_bits
from lowrank_optim.optim.moments import rounding_key

WEIGHT_ROUNDINGS = ("nearest", "stochastic", "compensated")


class Int8Holder(Protocol):
    """A module with an int8 weight, in the format of :mod:`lowrank_optim.ops.int8_weight`."""

    weight_codes: Tensor
    weight_scale: Tensor


class Int8Reference:
    """The attribute ``int8_reference`` of a parameter that stands for an int8 weight: where the weight is.

    Weak, because the module holds the parameter; to the module and not to its buffers, because those are replaced when
    a module moves or loads. Pickled it is empty: a module binds its parameter anew when it is unpickled.
    """

    def __init__(self, holder: Int8Holder | None = None) -> None:
        self._holder = None if holder is None else weakref.ref(holder)

    def __reduce__(self) -> tuple[type[Int8Reference], tuple[()]]:
        return Int8Reference, ()

    def parts(self) -> tuple[Tensor, Tensor]:
        """Codes and scales.

        Raises:
            RuntimeError: the module is gone, or was not pickled with the optimizer.
        """
        holder = None if self._holder is None else self._holder()
        if holder is None:
            raise RuntimeError("The module of an int8 weight is gone: keep, copy and pickle it with its optimizer")
        return holder.weight_codes, holder.weight_scale


def is_int8(param: Tensor) -> bool:
    """Whether a parameter stands for an int8 weight that a module holds."""
    return hasattr(param, "int8_reference")


def int8_parts(param: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the weight that a parameter stands for; raises as :meth:`Int8Reference.parts` does."""
    reference: Int8Reference = param.int8_reference  # type: ignore[attr-defined]
    return reference.parts()


def check_storable(param: Tensor, weight_rounding: str) -> None:
    """Raise ValueError where a parameter's dtype cannot be rounded as asked."""
    if weight_rounding != "nearest" and param.dtype == torch.float16:
        raise ValueError(
            f"Invalid weight_rounding: {weight_rounding!r} for a float16 parameter of shape {tuple(param.shape)}, "
            "expected 'nearest', or bfloat16 parameters"
        )


def init_storage(param: Tensor, state: dict[str, Any], weight_rounding: str) -> None:
    """Allocate what is kept beside a parameter and is not there yet, on the meta device too."""
    absent = "weight_correction" not in state and not is_int8(param)
    if weight_rounding == "compensated" and param.dtype == torch.bfloat16 and absent:
        state["weight_correction"] = torch.zeros_like(param, dtype=torch.int8, memory_format=torch.contiguous_format)


@contextmanager
def writable(param: Tensor, state: dict[str, Any], weight_rounding: str) -> Iterator[Tensor]:
    """The value of a parameter, for in-place updates that are written back at the end.

    - an int8 weight, whatever ``weight_rounding``: an fp32 copy, rounded stochastically to codes of renewed scales.
    - "nearest", and every parameter that is not bfloat16: the parameter itself, without a copy.
    - "stochastic": an fp32 copy, rounded once, up with the probability of the part that is cut off.
    - "compensated": an fp32 copy of the bfloat16 weight plus its int8 correction (``weight_correction``).
    """
    if is_int8(param):
        codes, scale = int8_parts(param)
        value = dequantize_int8_weight(codes, scale, torch.float32)
        yield value
        quantize_int8_weight_(codes, scale, value, rounding_key(state, "weight"))
        return
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


def move_stored_(
    param: Tensor, left: Tensor | None, right: Tensor | None, state: dict[str, Any], weight_rounding: str,
    backend: str | None, *, alpha: float | Tensor, decay: float | Tensor, grad: Tensor | None, factor: Tensor | None,
) -> None:  # fmt: skip
    """:func:`lowrank_optim.ops.lowrank_update.lowrank_update_` of a parameter as it is stored; see :func:`writable`.

    The other arguments are those of that operation; matrix units take ``left`` and ``right`` in the parameter's dtype.
    """
    scale = "column_scale" if factor is not None and factor.shape[0] == 1 < factor.shape[1] else "row_scale"
    update: dict[str, Any] = {"alpha": alpha, "decay": decay, "grad": grad, scale: factor}
    if is_int8(param):
        left, right = (None if side is None else side.to(param.dtype) for side in (left, right))
        move_int8_ = pick(lowrank_update_int8_, backend, param.device)
        move_int8_(*int8_parts(param), left, right, key=rounding_key(state, "weight"), **update)
        return
    if weight_rounding != "nearest" and param.dtype == torch.bfloat16:
        update["key"] = rounding_key(state, "weight")
        if weight_rounding == "compensated":
            init_storage(param, state, "compensated")
            update["correction"] = state["weight_correction"]
    pick(lowrank_update_, backend, param.device)(param, left, right, **update)
