"""How a parameter is stored: the only place that knows ``weight_rounding`` and quantized weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.lowrank_update_int4 import lowrank_update_int4_
from lowrank_optim.ops.lowrank_update_int8 import lowrank_update_int8_
from lowrank_optim.ops.quantized_weight import FORMATS
from lowrank_optim.ops.rounding import join_24_bits, round_to_bfloat16, split_24_bits
from lowrank_optim.optim.parts import Group, Scalar, Slot, Slots, State, Update, View
from lowrank_optim.optim.state_storage import position, rounding_key, spread_rounding
from lowrank_optim.optim.views import as_matrices

WEIGHT_ROUNDINGS = ("nearest", "stochastic", "compensated")


class QuantizedHolder(Protocol):
    """A module with a quantized weight, in a format of :mod:`lowrank_optim.ops.quantized_weight`."""

    weight_codes: Tensor
    weight_scale: Tensor


class QuantizedReference:
    """The attribute ``quantized_reference`` of a parameter that stands for a quantized weight: where the weight is.

    Weak, because the module holds the parameter; to the module and not to its buffers, because those are replaced when
    a module moves or loads. Pickled it is empty: a module binds its parameter anew when it is unpickled.
    """

    def __init__(self, holder: QuantizedHolder | None = None) -> None:
        self._holder = None if holder is None else weakref.ref(holder)

    def __reduce__(self) -> tuple[type[QuantizedReference], tuple[()]]:
        return QuantizedReference, ()

    def parts(self) -> tuple[Tensor, Tensor]:
        """Codes and scales.

        Raises:
            RuntimeError: the module is gone, or was not pickled with the optimizer.
        """
        holder = None if self._holder is None else self._holder()
        if holder is None:
            raise RuntimeError("The module of a quantized weight is gone: keep, copy and pickle it with its optimizer")
        return holder.weight_codes, holder.weight_scale


def is_quantized(param: Tensor) -> bool:
    """Whether a parameter stands for a quantized weight that a module holds."""
    return hasattr(param, "quantized_reference")


def quantized_parts(param: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the weight that a parameter stands for; raises as :meth:`QuantizedReference.parts` does."""
    reference: QuantizedReference = param.quantized_reference  # type: ignore[attr-defined]
    return reference.parts()


def check_storable(param: Tensor, weight_rounding: str) -> None:
    """Raise ValueError where a parameter's dtype cannot be rounded as asked."""
    if weight_rounding != "nearest" and param.dtype == torch.float16:
        raise ValueError(
            f"Invalid weight_rounding: {weight_rounding!r} for a float16 parameter of shape {tuple(param.shape)}, "
            "expected 'nearest', or bfloat16 parameters"
        )


def weight_slots(param: Tensor, weight_rounding: str) -> Slots:
    """What is kept beside a parameter."""
    if weight_rounding == "compensated" and param.dtype == torch.bfloat16 and not is_quantized(param):
        return {"weight_correction": Slot(tuple(param.shape), torch.int8, "elements")}
    return {}


@contextmanager
def writable(param: Tensor, state: dict[str, Any], weight_rounding: str) -> Iterator[Tensor]:
    """The value of a parameter, for in-place updates that are written back at the end.

    - a quantized weight, whatever ``weight_rounding``: an fp32 copy, rounded stochastically to codes of renewed scales.
    - "nearest", and every parameter that is not bfloat16: the parameter itself, without a copy.
    - "stochastic": an fp32 copy, rounded once, up with the probability of the part that is cut off.
    - "compensated": an fp32 copy of the bfloat16 weight plus its int8 correction (``weight_correction``).
    """
    if is_quantized(param):
        codes, scale = quantized_parts(param)
        value = FORMATS[codes.dtype].dequantize(codes, scale, param.shape[1], torch.float32)
        yield value
        FORMATS[codes.dtype].quantize_(codes, scale, value, **_rounding(codes, state))
        return
    if weight_rounding == "nearest" or param.dtype != torch.bfloat16:
        yield param
        return
    start = position(state, param, weight=True)
    # Rounding reinterprets bits by position, so the copy is contiguous even where the parameter is not.
    if weight_rounding == "stochastic":
        value = param.to(torch.float32, memory_format=torch.contiguous_format)
        yield value
        param.copy_(round_to_bfloat16(value, rounding_key(state, "weight"), start))
        return
    value = join_24_bits(param.contiguous(), state["weight_correction"])
    yield value
    rounded, correction = split_24_bits(value, rounding_key(state, "weight"), start)
    param.copy_(rounded)
    state["weight_correction"].copy_(correction)


def value_of(param: Tensor) -> Tensor:
    """The value of a parameter, a copy of a quantized weight."""
    if not is_quantized(param):
        return param
    codes, scale = quantized_parts(param)
    return FORMATS[codes.dtype].dequantize(codes, scale, param.shape[1], torch.float32)


def _rounding(codes: Tensor, state: State) -> dict[str, Any]:
    """What rounds a quantized weight in the current step."""
    if codes.dtype == torch.int8:
        return {"key": rounding_key(state, "weight")}
    return spread_rounding(state, "weight")


def write_(
    param: Tensor, view: View, update: Update, grad: Tensor, basis: Tensor | None, state: State, group: Group,
    *, size: Scalar, decay: Scalar, decay_first: bool,
) -> None:  # fmt: skip
    """Move one compressed parameter as it is stored, decay and rounding included: the one place that does so.

    Args:
        param: as it is stored.
        view: its shape as matrices.
        update: in oriented coordinates, without the step size.
        grad: oriented.
        basis: (..., d, rank); None where nothing is projected back.
        size: the step size, negative for descent.
        decay: what the weight is multiplied with, before the update if ``decay_first``, else after it.
    """
    if view.kind == "stack" and any(isinstance(x, Tensor) and x.ndim == 3 for x in (size, decay)):
        # A step size, or a decay, for every matrix of a stack; the operation takes one.
        _write_each_(param, view, update, grad, basis, state, group, size, decay, decay_first)
        return
    if not decay_first:
        # decay (W + U) = decay W + decay U
        size = size * decay
    left, right = (None, None) if update.low is None else (update.low, basis)
    row_scale, column_scale = update.row_scale, update.column_scale
    if update.full is not None:
        # A convolution that is compressed as it is moves as a matrix.
        view = view.as_matrix()
        grad = as_matrices(update.full, view) if not state["left"] else update.full
        row_scale = torch.ones(*view.batch, 1, 1, dtype=view.wide.to_real(), device=grad.device)
    slope = None if row_scale is None and column_scale is None else grad
    if state["left"]:
        # (X Pᴴ)ᵀ = P̄ Xᵀ: the weight stays in its own layout.
        left, right = (None if side is None else side.conj() for side in (right, left))
        slope = None if slope is None else slope.mT
        # One number a matrix is a row scale in either layout.
        if row_scale is None or row_scale.shape[-2] > 1 or column_scale is not None:
            row_scale, column_scale = (None if t is None else t.mT for t in (column_scale, row_scale))
    options: dict[str, Any] = {"alpha": size * update.scale, "decay": decay}
    if slope is not None:
        options |= {"grad": slope, "grad_alpha": size, "row_scale": row_scale, "column_scale": column_scale}
    rounding, backend = group["weight_rounding"], group["backend"]
    if is_quantized(param):
        left, right = (None if side is None else side.to(param.dtype) for side in (left, right))
        codes, scale = quantized_parts(param)
        options.update(_rounding(codes, state))
        if codes.dtype == torch.int8:
            pick(lowrank_update_int8_, backend, param.device)(codes, scale, left, right, **options)
        else:
            update_int4_ = pick(lowrank_update_int4_, backend, param.device)
            update_int4_(codes, scale, left, right, columns=param.shape[1], **options)
        return
    weight = as_matrices(param, view)
    if rounding != "nearest" and param.dtype == torch.bfloat16:
        options |= {"key": rounding_key(state, "weight"), "start": position(state, weight, weight=True)}
        if rounding == "compensated":
            options["correction"] = state["weight_correction"].view(view.shape)
    # On an H200 cuBLAS takes 0.034 ms at 4096 x 4096, bf16, rank 256, the kernel 0.048 (benchmarks/results/gpu.jsonl).
    plain = slope is None and "key" not in options and not isinstance(size, Tensor) and not isinstance(decay, Tensor)
    keeps_eager = (backend is None and plain) or _keeps_eager(param, backend)
    move_ = lowrank_update_ if keeps_eager else pick(lowrank_update_, backend, param.device)
    move_(weight, left, right, **options)
    # A compiler follows strides; the one of torch 2.11 gives up at a comparison of addresses.
    if weight is not param and not param.is_contiguous():
        param.copy_(weight.view(param.shape))


def _write_each_(
    param: Tensor, view: View, update: Update, grad: Tensor, basis: Tensor | None, state: State, group: Group,
    size: Scalar, decay: Scalar, decay_first: bool,
) -> None:  # fmt: skip
    for i in range(view.shape[0]):
        one = view._replace(shape=view.shape[1:], kind="matrix")
        some = {key: value for key, value in update._asdict().items() if isinstance(value, Tensor) and value.ndim == 3}
        # Every matrix has random bits of its own.
        own = {**state, "seed": state["seed"] + 0x9E3779B9 * (i + 1)}
        if "weight_correction" in state:
            own["weight_correction"] = state["weight_correction"][i]
        step, kept = (x[i].view(()) if isinstance(x, Tensor) and x.ndim == 3 else x for x in (size, decay))
        write_(
            param[i], one, update._replace(**{key: value[i] for key, value in some.items()}), grad[i],
            None if basis is None else basis[i], own, group, size=step, decay=kept,
            decay_first=decay_first,
        )  # fmt: skip


def _keeps_eager(param: Tensor, backend: str | None) -> bool:
    """Whether the eager operation is taken whatever kernels there are."""
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16) or torch.compiler.is_compiling():
        return True
    # Products without matrix units are cuBLAS' to make.
    return backend is None and param.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
