"""8-bit states move no weight much further than fp32 states do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optimizers import OPTIMIZERS, accepts

SHAPE = (512, 64)
ROWS, UPDATES = 24, 20

# What a class is built with beside lr, and of which arguments its fp32 counterpart differs.
EIGHT_BITS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"state_dtype": "int8"}) for name in OPTIMIZERS if accepts(name, "state_dtype")),
    ("DCTAdamW", {"state_dtype": "int8", "error_feedback": "int8"}),
    ("DCTAdamW", {"error_feedback": "int8"}),
    ("GaLoreAdamW8bit", {}),
    ("QGaLoreAdamW8bit", {}),
]
FULL_PRECISION = {"state_dtype": "float32", "error_feedback": "full"}
# Rank 16 for moments of more than 4096 values, which are stored in 8 bits.
COMMON = {"lr": 1e-2, "rank": 16, "update_proj_gap": 7, "weight_decay": 0.0, "scale_parameter": False, "beta1": 0.9}


def embedding_gradients() -> Iterator[Tensor]:
    """A few rows have a gradient in a step, and the scales of the rows spread over four decades."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (-4 * torch.rand(SHAPE[0], 1, generator=generator))
    for _ in range(UPDATES):
        grad = torch.zeros(SHAPE)
        rows = torch.randperm(SHAPE[0], generator=generator)[:ROWS]
        grad[rows] = torch.randn(ROWS, SHAPE[1], generator=generator) * scale[rows]
        yield grad


def largest_movement(name: str, **options: Any) -> float:
    weight = nn.Parameter(torch.zeros(SHAPE))
    optimizer = OPTIMIZERS[name]([weight], **{key: value for key, value in options.items() if accepts(name, key)})
    for weight.grad in embedding_gradients():
        optimizer.step()
    return float(weight.detach().abs().max())


@pytest.mark.filterwarnings("ignore:.*full-rank rule")
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize(("name", "options"), EIGHT_BITS, ids=[f"{n}-{','.join(o)}" for n, o in EIGHT_BITS])
def test_the_largest_movement_is_that_of_fp32(name: str, options: dict[str, Any], rank: int | None) -> None:
    if rank is not None and not accepts(name, "rank"):
        pytest.skip("the rank belongs to the layers")
    common = {**COMMON, "rank": rank, "adamw_lr": 1e-2}
    # A class that is always in 8 bits is compared with its parent at its own eps.
    wide = "GaLoreAdamW" if name.endswith("8bit") else name
    common["eps"] = inspect.signature(OPTIMIZERS[name]).parameters["eps"].default
    expected = largest_movement(wide, **common, **{key: FULL_PRECISION[key] for key in options})
    assert 0 < largest_movement(name, **common, **options) <= 1.5 * expected
