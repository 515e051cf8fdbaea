"""Hyper-parameters out of range: one clear error that names the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_range(name: str, value: Any, *, low: float, high: float = float("inf"), high_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number (or one-element tensor) in [low, high] or [low, high)."""
    interval = f"a number in [{low:g}, {high:g}{')' if high_open or high == float('inf') else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"Invalid {name}: {value!r}, expected {interval}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Invalid {name}: tensor of shape {tuple(value.shape)}, expected one element")
        if value.is_cuda:
            # Reading a device scalar would synchronise; torch.optim does not look at it either.
            return
    if not (low <= value < high or (value == high and not high_open and high != float("inf"))):
        raise ValueError(f"Invalid {name}: {value}, expected {interval}")


def check_positive_int(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ValueError unless ``value`` is an int of at least 1, or None where ``optional``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}, expected a positive int{' or None' if optional else ''}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r}, expected one of {', '.join(map(repr, choices))}")


def nearest(given: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``"; did you mean X?"`` for the known word that ``given`` resembles, else nothing."""
    # Dashes in front and capitals are no likeness.
    plain = {word.strip("-").lower(): word for word in known}
    near = difflib.get_close_matches(given.strip("-").lower(), plain, n=1, cutoff=cutoff)
    return f"; did you mean {plain[near[0]]}?" if near else ""
