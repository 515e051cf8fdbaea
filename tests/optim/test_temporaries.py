"""Between refreshes: few temporaries of the weight's size, no waiting for the device, no write to the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.optimizers import build
from tests.temporaries import CountTemporaries

# Allowed on the CPU, and on a device, where a non-finite gradient must be masked unseen; fp32 weights.
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("GaLoreAdamW", {}, 0, 0),
    ("FiraAdamW", {}, 0, 0),
    ("FiraAdamW", {"residual": "paper", "proj_type": "reverse_std"}, 0, 0),
    ("FiraAdamW", {"limiter_gamma": None}, 0, 0),
    ("APOLLOAdamW", {}, 0, 0),
    ("APOLLOAdamW", {"proj": "svd", "scale_type": "tensor"}, 0, 0),
    ("APOLLOMini", {}, 0, 0),
    ("FRUGALAdamW", {}, 1, 1),
    ("FRUGALAdamW", {"projection": "svd"}, 1, 1),
    ("FRUGALAdamW", {"projection": "dct"}, 1, 1),
    ("FRUGALAdamW", {"projection": "random", "inactive_lr_scale": 0.1}, 1, 1),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs, *_ in CASES]
SHAPES = [(96, 64), (64, 96)]


def between_refreshes(
    name: str, kwargs: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, device: str, rank: int = 8
) -> list[str]:
    """What the second step allocates; the weight decays too."""
    p = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    optimizer = build(name, [p], rank=rank, update_proj_gap=100, weight_decay=0.1, **kwargs)
    p.grad = torch.randn(shape, dtype=dtype, device=device)
    if device == "meta":
        # A meta tensor has no values: a refresh cannot look at it, and whatever waits for the device raises.
        optimizer.init_state(p, optimizer.param_groups[0])["step"] = 1
    else:
        optimizer.step()
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    return count.created


@pytest.mark.parametrize(("name", "kwargs", "host", "device"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_size_temporaries(
    name: str, kwargs: dict[str, Any], host: int, device: int, shape: tuple[int, int]
) -> None:
    assert len(between_refreshes(name, kwargs, shape, torch.float32, "cpu")) == host
    assert len(between_refreshes(name, kwargs, shape, torch.float32, "meta")) == device


@pytest.mark.parametrize(("name", "kwargs", "host", "device"), CASES, ids=IDS)
def test_low_precision_takes_no_more_than_one(name: str, kwargs: dict[str, Any], host: int, device: int) -> None:
    for where in ("cpu", "meta"):
        assert len(between_refreshes(name, kwargs, SHAPES[0], torch.bfloat16, where)) <= 1


def test_the_counter_counts() -> None:
    a = torch.ones(8, 8)
    with CountTemporaries(64) as count:
        a.mT.mul_(2)
        a.view(64)[:3].add(1)
        b = a + 1
        b.copy_(a)
        torch.linalg.qr(a)
    assert count.created == ["aten.add.Tensor", "aten.linalg_qr.default", "aten.linalg_qr.default"]
