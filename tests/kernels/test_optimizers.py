"""Whole optimizers: with kernels as without, and nothing as large as a weight in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.ops.rounding import join_24_bits
from tests.conformance import nightly
from tests.optimizers import build
from tests.temporaries import CountTemporaries

CASES: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {}),
    ("GaLoreAdamW", {"proj_type": "reverse_std", "maximize": True, "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}),
    ("GaLoreAdamW8bit", {}),
    ("QGaLoreAdamW8bit", {"queue_size": 1}),
    ("FiraAdamW", {}),
    ("FiraAdamW", {"residual": "paper", "proj_type": "reverse_std"}),
    ("FiraAdamW", {"capturable": True, "lr": torch.tensor(0.01)}),
    ("FiraAdamW", {"state_dtype": "int8", "limiter_gamma": None}),
    ("APOLLOAdamW", {}),
    ("APOLLOAdamW", {"proj": "svd", "scale_front": True, "state_dtype": "int8"}),
    ("APOLLOMini", {"scale": 2.0, "rank": 1}),
    ("DCTAdamW", {}),
    ("DCTAdamW", {"capturable": True, "state_dtype": "int8"}),
    ("LDAdamW", {}),
]
NAMES = ("GaLoreAdamW", "GaLoreAdamW8bit", "QGaLoreAdamW8bit", "FiraAdamW", "APOLLOAdamW", "APOLLOMini")
ROUNDINGS = ("nearest", "stochastic", "compensated")
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in CASES]
SHAPES = [(37, 61), (61, 37)]


@pytest.fixture(autouse=True)
def _small_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)


def run(name: str, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]
    optimizer = build(name, params, backend=backend, weight_decay=0.1, update_proj_gap=2, **kwargs)
    for step in range(4):
        torch.manual_seed(step + 1)
        for p in params:
            p.grad = torch.randn(p.shape, device=device).to(dtype)
        optimizer.step()
    if kwargs.get("weight_rounding") != "compensated":
        return [p.detach().float() for p in params]
    return [join_24_bits(p.detach(), optimizer.state[p]["weight_correction"]) for p in params]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=IDS)
def test_fp32_weights(name: str, kwargs: dict[str, Any], device: torch.device) -> None:
    pairs = zip(*(run(name, kwargs, torch.float32, device, backend) for backend in ("eager", "triton")))
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rounding"), list(zip(NAMES, ROUNDINGS * 2)), ids=str)
def test_bfloat16_weights(name: str, rounding: str, device: torch.device) -> None:
    kwargs = {"weight_rounding": rounding, "lr": 1e-3}
    theirs, ours = (run(name, kwargs, torch.bfloat16, device, backend) for backend in ("eager", "triton"))
    for a, b in zip(theirs, ours):
        # Rounded otherwise a weight is off by 2^-8 of itself.
        assert float((a - b).norm() / b.norm()) < (1e-4 if rounding == "compensated" else 2.0**-8)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bfloat16_weights_that_are_not_compressed(rounding: str, device: torch.device) -> None:
    kwargs = {"weight_rounding": rounding, "lr": 1e-3, "rank": None}
    theirs, ours = (run("GaLoreAdamW", kwargs, torch.bfloat16, device, backend) for backend in ("eager", "triton"))
    for a, b in zip(theirs, ours):
        assert float((a - b).norm() / b.norm()) < (1e-4 if rounding == "compensated" else 2.0**-8)


@pytest.mark.parametrize(("name", "rounding"), list(zip(NAMES, ROUNDINGS * 2)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), *nightly(((64, 96),))], ids=str)
def test_no_full_size_temporary(
    name: str, rounding: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    p = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    optimizer = build(name, [p], backend="triton", weight_decay=0.1, weight_rounding=rounding, rank=8)
    p.grad = torch.randn(shape, device=device).to(dtype)
    optimizer.step()
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    assert count.created == []
