"""How a moment is stored: the only place that knows ``state_dtype``.

A rule declares a moment with :func:`moment_slots`, computes on what :func:`load_moment` returns, in place, and hands it
back to :func:`store_moment_`. With ``state_dtype="float32"`` that is the stored tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import blockwise4, int8_blocks
from lowrank_optim.ops.blockwise import BLOCK, dequantize, quantize_
from lowrank_optim.ops.rounding import Positions, advanced, mix_key, round_to_bfloat16
from lowrank_optim.optim.finite import is_finite
from lowrank_optim.optim.parts import Slot, Slots, State

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")

# As in bitsandbytes: below this number of values 8 bits save nothing.
MIN_8BIT_SIZE = 4096

# A moment in few bits is its codes and its scales, under keys that end like this: 8 bits, 4 bits.
CODES = (".codes", ".scale")
NIBBLES = (".nibbles", ".nibble_scale")

# Moments that are never negative use the unsigned map, which has twice as many codes for them.
UNSIGNED = frozenset({"exp_avg_sq"})

# Each use of random bits of one parameter in one step has a number of its own, "sum" one for every micro-batch.
SALTS = {
    **{"start": -1, "weight": 0, "exp_avg": 1, "exp_avg_sq": 2, "momentum": 3, "error": 4, "basis": 5, "sketch": 6},
    "sum": 7,
}

# In the state of a parameter of which this process has a part: the axis that is split, counted from the last one of the
# weight, its whole length, and where the part begins.
AXIS, LENGTH, FIRST = PART = "axis", "length", "first"

# Values that are computed on at a time where they are stored in fewer bits: some ten fp32 temporaries of 8 MB each.
SLICE = 2**21


def rounding_key(state: State, role: str) -> int | Tensor:
    """The key of the random bits that round one tensor of a parameter in the current step."""
    return mix_key(state["seed"], state["step"], SALTS[role])


def spread_rounding(state: State, role: str) -> dict[str, int | Tensor]:
    """Key and step of the random bits that are spread evenly over the steps, for what is stored in 4 bits."""
    return {"key": mix_key(state["seed"], 0, SALTS[role]), "step": state["step"]}


def position(state: State, tensor: Tensor, *, weight: bool = False) -> int | Positions:
    """Where a tensor stands in the counter of the random bits that round it: its first element, or all of a part.

    Args:
        weight: whether it is the weight as its view has it, or something of the state.
    """
    start: int | Positions = state.get("start", 0)
    axis: int | None = state.get(AXIS)
    if axis is None or "start" in state:
        return start
    if "left" in state and not weight:
        # What is oriented is split along its rows, or not at all.
        if axis != (-1 if state["left"] else -2):
            return start
        axis = -2
    axis += tensor.ndim
    inner = math.prod(tensor.shape[axis + 1 :])
    run, skip = tensor.shape[axis] * inner, (state[LENGTH] - tensor.shape[axis]) * inner
    at: int = state[FIRST] * inner
    return at if run == tensor.numel() else Positions(at, run, skip)


def moment_slots(key: str, shape: tuple[int, ...], dtype: torch.dtype, state_dtype: str, along: str | None) -> Slots:
    """A zero moment under ``key``, or its codes and scales.

    Complex moments, and with int8 and int4 those of fewer than 4096 values, keep ``dtype``; rows of an odd length,
    which two codes a byte do not fill, are int8 with int4.
    """
    numel = math.prod(shape)
    few_bits = state_dtype in ("int8", "int4")
    if dtype.is_complex or state_dtype == "float32" or (few_bits and numel < MIN_8BIT_SIZE):
        return {key: Slot(shape, dtype, along)}
    if state_dtype == "bfloat16":
        return {key: Slot(shape, torch.bfloat16, along)}
    # A scale of 0 makes every code a zero.
    if state_dtype == "int4" and shape[-1] % 2 == 0:
        codes, scale = NIBBLES
        return {
            f"{key}{codes}": Slot((*shape[:-1], shape[-1] // 2), torch.uint8, None if along == "elements" else along),
            f"{key}{scale}": Slot((blockwise4.block_count(numel),), torch.float32),
        }
    codes, scale = CODES
    return {
        f"{key}{codes}": Slot(shape, torch.uint8, along),
        f"{key}{scale}": Slot((-(-numel // BLOCK),), torch.float32),
    }


def is_int4(state: State, key: str) -> bool:
    """Whether a moment is stored in 4 bits."""
    return f"{key}{NIBBLES[0]}" in state


def _stored(state: State, key: str) -> tuple[str, str]:
    """The keys of the codes and scales of a moment."""
    codes, scale = NIBBLES if is_int4(state, key) else CODES
    return f"{key}{codes}", f"{key}{scale}"


def load_moment(state: State, key: str, dtype: torch.dtype) -> Tensor:
    """A moment in at least fp32, to be modified in place.

    Args:
        state: of one parameter.
        key: "exp_avg", ...
        dtype: of the gradient; fp64 gradients make quantized moments fp64 for the computation.
    """
    moment = state.get(key)
    if moment is None:
        codes, scale = (state[name] for name in _stored(state, key))
        read = blockwise4.dequantize if is_int4(state, key) else dequantize
        moment = read(codes, scale, signed=key not in UNSIGNED)
    elif moment.dtype != torch.bfloat16:
        return moment
    return moment.to(torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)


def store_moment_(state: State, key: str, moment: Tensor) -> None:
    """Put back what :func:`load_moment` returned; bfloat16 and int4 are rounded stochastically, int8 to the nearest."""
    stored = state.get(key)
    if stored is moment:
        return
    if stored is None:
        codes, scale = (state[name] for name in _stored(state, key))
        if is_int4(state, key):
            bits, start = spread_rounding(state, key), position(state, moment)
            blockwise4.quantize_(codes, scale, moment, signed=key not in UNSIGNED, start=start, **bits)
        else:
            quantize_(codes, scale, moment, signed=key not in UNSIGNED)
    elif stored.dtype == torch.bfloat16:
        random_key = rounding_key(state, key)
        stored.copy_(round_to_bfloat16(moment.to(torch.float32), random_key, position(state, moment)))
    else:
        stored.copy_(moment)


def replace_moment_(state: State, key: str, values: Tensor, ok: bool | Tensor) -> None:
    """Overwrite a moment, unless the verdict ``ok`` on the gradient says that it is not finite."""
    if not isinstance(ok, Tensor):
        store_moment_(state, key, values)
    elif key in state:
        moment = load_moment(state, key, values.dtype)
        store_moment_(state, key, torch.where(is_finite(ok), values, moment, out=moment))
    else:
        # Codes of what codes stand for are not always the same codes.
        before = {part: state[part].clone() for part in _stored(state, key)}
        store_moment_(state, key, values)
        for part, old in before.items():
            torch.where(is_finite(ok), state[part], old, out=state[part])


def scale_slot(codes: Slot) -> Slot:
    """The scales of the codes of a moment, or of an error in linear int8."""
    count = -(-math.prod(codes.shape) // BLOCK) if codes.dtype == torch.uint8 else int8_blocks.blocks(codes.shape)
    return Slot((count,), torch.float32)


def decode(state: Mapping[str, Any], key: str) -> Tensor:
    """The values of ``key.codes`` and ``key.scale`` in fp32, in the shape of the codes."""
    codes, scale = state[f"{key}.codes"], state[f"{key}.scale"]
    if codes.dtype == torch.uint8:
        return dequantize(codes, scale, signed=key not in UNSIGNED)
    return int8_blocks.dequantize(codes, scale, torch.float32)


def holds_codes(state: Mapping[str, Any], key: str, slot: Slot) -> bool:
    """Whether a state has a moment as codes, one a value."""
    codes, scale = (state.get(f"{key}.{part}") for part in ("codes", "scale"))
    return isinstance(codes, Tensor) and isinstance(scale, Tensor) and codes.shape == slot.shape


def recoded(state: Mapping[str, Any], slots: Slots) -> State:
    """A saved state whose moments are values where ``slots`` has codes, or the reverse, as ``slots`` has them.

    Values that were decoded become the same codes again.
    """
    found = dict(state)
    for name, slot in slots.items():
        key, _, suffix = name.partition(".")
        values = state.get(key)
        if suffix == "codes" and isinstance(slot, Slot) and isinstance(values, Tensor) and values.shape == slot.shape:
            del found[key]
            codes = torch.empty(slot.shape, dtype=slot.dtype, device=values.device)
            scale = torch.empty(scale_slot(slot).shape, dtype=torch.float32, device=values.device)
            if slot.dtype == torch.uint8:
                quantize_(codes, scale, values, signed=key not in UNSIGNED)
            else:
                int8_blocks.quantize_(codes, scale, values.contiguous())
            found.update({name: codes, f"{key}.scale": scale})
        elif not suffix and isinstance(slot, Slot) and holds_codes(state, key, slot):
            found[key] = decode(state, key)
            del found[f"{key}.codes"], found[f"{key}.scale"]
    return found


def slices(state: State, *tensors: Tensor) -> Iterator[tuple[State, tuple[Tensor, ...]]]:
    """Tensors and the state of their elements in flat slices; all at once where they are small or not contiguous.

    What is computed element by element becomes the same bits, in memory for one slice: a slice begins with a block of
    the 8-bit format, and its state knows by ``start`` where it stands in the counter of the random bits.

    Args:
        state: of one parameter.
        tensors: of one shape, that of the moments.
    """
    numel, first = tensors[0].numel(), position(state, tensors[0])
    if numel <= SLICE or not all(t.shape == tensors[0].shape and t.is_contiguous() for t in tensors):
        yield state, tensors
        return
    for start in range(0, numel, SLICE):
        stop = min(start + SLICE, numel)
        part: dict[str, Any] = {**state, "start": advanced(first, start)}
        for key, value in state.items():
            if key.endswith(CODES[1]):
                part[key] = value[start // BLOCK : -(-stop // BLOCK)]
            elif key.endswith(NIBBLES[1]):
                part[key] = value[start // blockwise4.BLOCK : blockwise4.block_count(stop)]
            elif key.endswith(NIBBLES[0]):
                part[key] = value.view(-1)[start // 2 : stop // 2]
            elif isinstance(value, Tensor) and value.numel() == numel and value.is_contiguous():
                part[key] = value.view(-1)[start:stop]
        yield part, tuple(t.view(-1)[start:stop] for t in tensors)
