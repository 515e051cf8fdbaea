from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The suite runs in several processes; threads of one would starve the other.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
    return config


@pytest.fixture(scope="session")
def golden_inputs() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "inputs.npz"))
