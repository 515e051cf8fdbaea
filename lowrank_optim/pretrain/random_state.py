"""Random numbers of a process: the states of all generators, and the seed of one that has none."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """The seed of a process that has no random state of its own after ``step`` updates."""
    return (seed + rank + (step << 20)) % 2**63


def random_state() -> dict[str, Any]:
    """States of every generator of this process, in types that ``weights_only`` loads."""
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
