from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test imports lowrank_kernels.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The suite runs in several processes; threads of one would starve the other.
    torch.set_num_threads(1)
    # torch.manual_seed keeps a stack trace for every device that is not there, which takes longer than many a test.
    torch.manual_seed(0) if torch.cuda.is_available() else torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def golden_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
    return config


@pytest.fixture(scope="session")
def golden_inputs() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "inputs.npz"))


@pytest.fixture
def record_reference_error(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Record how far a trajectory is from the published one, for ``python -m benchmarks.reference``."""

    def record(optimizer: str, ours: list[np.ndarray], theirs: np.ndarray, start: np.ndarray) -> None:
        error = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
        record_property(f"reference error {optimizer}", error / float(np.abs(theirs[-1] - start).max()))

    return record
