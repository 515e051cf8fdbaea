"""The contract of a parameter's state: what its slots say is what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.optim.parts import Group, Number, Slot, Slots, State
from lowrank_optim.optim.state_storage import PART, SALTS

# What some method of the package keeps, up to the first dot. Everything else in a state belongs to somebody else.
OWN = frozenset(
    {
        *("step", "seed", "left", "side", "rank", "waiting", "basis", "indices", "refreshes", "gap", "overlaps"),
        *("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "error", "momentum", "update_norm"),
        *("covariance", "outside", "row_scale", "column_scale", "reset_step", "updates", "weight_correction", "batch"),
        *("pending", *PART),
    }
)


def is_own(key: str) -> bool:
    """Whether a key of a state is one of the package's."""
    return key.partition(".")[0] in OWN


def allocate_(state: State, slots: Slots, device: torch.device) -> None:
    """Fill a state with new numbers and tensors, on the meta device too."""
    for key, slot in slots.items():
        if isinstance(slot, Number):
            state[key] = slot.initial
        elif not slot.late:
            state[key] = laid_out(torch.full(slot.shape, slot.fill, dtype=slot.dtype, device=device), slot)
            if slot.std > 0:
                *batch, rows, columns = slot.shape
                normal = gaussian(
                    rows, columns, key=mix_key(state["seed"], crc32(key.encode()), SALTS["start"]),
                    dtype=slot.dtype.to_real(), device=device, batch=batch,
                )  # fmt: skip
                state[key].add_(normal, alpha=slot.std)


def laid_out(tensor: Tensor, slot: Slot) -> Tensor:
    """The tensor in the order of memory that its slot asks for; sums of products depend on it in their last bits."""
    return tensor.mT.contiguous().mT if slot.by_columns and tensor.device.type == "cpu" else tensor


def fit_(state: State, slots: Slots, device: torch.device, before: Slots | None) -> bool:
    """Make a state fit changed slots; whether it had to be rebuilt, with its step count at 0.

    Tensors of another floating dtype are cast, and the correction of a weight comes and goes by itself. A number that
    is not fixed takes its new initial value if that differs from the one in ``before``.
    """
    for key, slot in slots.items():
        if isinstance(slot, Number):
            old = None if before is None else before.get(key)
            if key not in state or (isinstance(old, Number) and not slot.fixed and old.initial != slot.initial):
                state[key] = slot.initial
    if "weight_correction" not in slots:
        state.pop("weight_correction", None)
    elif "weight_correction" not in state:
        slot = slots["weight_correction"]
        assert isinstance(slot, Slot)
        state["weight_correction"] = torch.zeros(slot.shape, dtype=slot.dtype, device=device)
    if all(complaint(state, key, slot) is None for key, slot in slots.items()) and not surplus(state, slots):
        for key, slot in slots.items():
            if isinstance(slot, Slot) and key in state:
                state[key] = state[key].to(slot.dtype)
        return False
    kept: State = {key: state[key] for key in ("seed", "weight_correction") if key in state}
    for key in [key for key in state if is_own(key)]:
        del state[key]
    allocate_(state, slots, device)
    state.update(kept)
    return True


def surplus(state: Mapping[str, Any], slots: Slots) -> list[str]:
    """Keys of the package in a state that no slot declares."""
    return [key for key in state if is_own(key) and key not in slots]


def complaint(state: Mapping[str, Any], key: str, slot: Slot | Number) -> str | None:
    """What is wrong with one entry, None for nothing."""
    value = state.get(key)
    if isinstance(slot, Number):
        if isinstance(value, int) and (not slot.fixed or value == slot.initial):
            return None
        return f"{describe(value)}, expected {slot.initial if slot.fixed else 'an int'}"
    if value is None and slot.late:
        return None
    expected = f"{slot.dtype} of shape {slot.shape}"
    if not isinstance(value, Tensor) or tuple(value.shape) != slot.shape:
        return f"{describe(value)}, expected {expected}"
    both_float = all(dtype.is_floating_point or dtype.is_complex for dtype in (value.dtype, slot.dtype))
    if value.dtype != slot.dtype and not (both_float and value.dtype.is_complex == slot.dtype.is_complex):
        return f"{describe(value)}, expected {expected}"
    return None


def describe(value: Any) -> str:
    """A value for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return "nothing" if value is None else repr(value)


def checked(saved: Mapping[str, Any], slots: Slots, name: str, device: torch.device) -> State:
    """A copy of a saved state on ``device`` that fits the slots.

    Raises:
        ValueError: a tensor that is missing, of another shape or kind, or not declared.
    """
    # Numbers that version 1 did not write follow from the slots.
    numbers = {key: slot.initial for key, slot in slots.items() if isinstance(slot, Number) and key != "step"}
    state = {**numbers, **saved}
    # The correction of a weight comes and goes with the weight's dtype.
    correction = slots.get("weight_correction")
    if correction is None:
        state.pop("weight_correction", None)
    elif isinstance(correction, Slot) and "weight_correction" not in state:
        state["weight_correction"] = torch.zeros(correction.shape, dtype=correction.dtype, device=device)
    for key, slot in slots.items():
        wrong = complaint(state, key, slot)
        if wrong is not None:
            raise ValueError(f"Invalid state_dict: {key!r} of {name} is {wrong}")
    extra = surplus(state, slots)
    if extra:
        raise ValueError(f"Invalid state_dict: {extra[0]!r} of {name} is {describe(state[extra[0]])}, expected nothing")
    copied: State = {}
    for key, value in state.items():
        declared = slots.get(key)
        if isinstance(value, Tensor):
            dtype = declared.dtype if isinstance(declared, Slot) else value.dtype
            found = value.detach().to(device=device, dtype=dtype, copy=True)
            copied[key] = laid_out(found, declared) if isinstance(declared, Slot) else found
        else:
            copied[key] = type(declared.initial)(value) if isinstance(declared, Number) else value
    return drop_unused(copied)


def drop_unused(state: State) -> State:
    """Without a tensor that stands for nothing: a refresh that is not under way."""
    if "pending" in state and not bool(state["pending"].any()):
        del state["pending"]
    return state


def absent(state: State, slots: Slots) -> dict[str, Tensor]:
    """Zeros on the CPU for what a state may hold and does not at the moment."""
    return {
        key: torch.zeros(slot.shape, dtype=slot.dtype, device="cpu")
        for key, slot in slots.items()
        if isinstance(slot, Slot) and slot.late and key not in state
    }


def match_names(ours: list[Group], saved: list[Group]) -> list[list[int]]:
    """For every parameter of our groups the number of its state in a saved one.

    Raises:
        ValueError: both sides have names, and they are not the same.
    """
    positions = [list(group["params"]) for group in saved]
    if not all("param_names" in group for group in (*ours, *saved)):
        return positions
    by_name = {name: key for group in saved for name, key in zip(group["param_names"], group["params"])}
    wanted = {name for group in ours for name in group["param_names"]}
    if wanted != set(by_name):
        missing, foreign = sorted(wanted - set(by_name)), sorted(set(by_name) - wanted)
        found = f"it lacks {missing[0]!r}" if missing else f"it has {foreign[0]!r}"
        raise ValueError(f"Invalid state_dict: its parameters have other names than the optimizer's, {found}")
    return [[by_name[name] for name in group["param_names"]] for group in ours]
