"""The published trajectories are met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import GOLDEN
from tests.optimizers import OPTIMIZERS

# Right after the first refresh with proj_type="full" the core PᵀGQ is diagonal: what the published code has beside
# the diagonal is its own rounding (1e-7), of which Adam's division makes 1e-2. No other arithmetic can meet that;
# from then on the increments must agree as closely as elsewhere.
NOISE_OF_THE_REFERENCE = {"galore_adamw_full": 2e-5}


@pytest.mark.parametrize("shape", ["tall", "wide", "square", "vector"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "right", "left", "full"])
def test_galore_adamw_meets_the_published_trajectory(
    side: str,
    shape: str,
    golden_config: dict[str, Any],
    golden_inputs: dict[str, np.ndarray],
    record_reference_error: Callable[..., None],
) -> None:
    method = f"galore_adamw_{side}"
    expected = np.load(GOLDEN / f"{method}.npz")[f"param/{shape}"]
    p = nn.Parameter(torch.tensor(golden_inputs[f"param/{shape}"]))
    other = nn.Parameter(torch.ones(9, 9))  # keeps the optimizer from warning about a lone vector
    optimizer = OPTIMIZERS["GaLoreAdamW"]([p, other], refresh="svd", **golden_config["methods"][method])
    ours = []
    for step in range(golden_config["steps"]):
        p.grad = torch.tensor(golden_inputs[f"grad/{shape}"][step])
        optimizer.step()
        if step + 1 in golden_config["kept_steps"]:
            ours.append(p.detach().numpy().copy())
    assert len(ours) == len(expected) == len(golden_config["kept_steps"])
    record_reference_error("GaLoreAdamW", ours, expected, golden_inputs[f"param/{shape}"])
    errors = [a - b for a, b in zip(ours, expected)]
    assert np.abs(errors[0]).max() <= NOISE_OF_THE_REFERENCE.get(method, 1e-6)
    assert max(np.abs(error - errors[0]).max() for error in errors) <= 1e-6
