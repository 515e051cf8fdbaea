"""The kernel against fp64, relative to the error of the eager operation."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from lowrank_optim import Trion
from lowrank_optim.ops import pick
from lowrank_optim.ops.gram import gram as eager
from tests.conformance import nightly

# Before the fixture.
SYMMETRIC_FROM = importlib.import_module("lowrank_kernels.gram").SYMMETRIC_FROM
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.jsonl"


@pytest.fixture(autouse=True)
def _always_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("lowrank_kernels.gram"), "SYMMETRIC_FROM", 1)


@pytest.mark.parametrize("dtype", [*nightly(torch.bfloat16), torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5461, 3), (7, 200), (65, 64), (1, 1), (0, 5), (33, 129)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", *nightly("transposed"), "strided"])
def test_gram(shape: tuple[int, int], dtype: torch.dtype, layout: str, device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    rows, columns = shape
    x = torch.randn(rows, columns, device=device).to(dtype)
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    addend = eager(torch.randn(columns, columns, device=device)).to(dtype)
    for extra in ({}, {"addend": addend, "alpha": 0.4, "beta": -1.7}):
        ours, theirs = kernel(x, **extra), eager(x, **extra)
        exact = eager(x.double(), **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()})
        assert ours.dtype == dtype and torch.equal(ours, ours.T)
        # Twice the eager error: another order of the sum.
        error = (ours.double() - exact).norm()
        assert error <= 2 * (theirs.double() - exact).norm() + 1e-6 * exact.norm()


def test_every_tile_of_the_triangle_is_visited_once(device: torch.device) -> None:
    # 11 blocks of columns, of which each has one row that is not zero.
    x = torch.eye(11 * 64, device=device, dtype=torch.bfloat16)[::64].contiguous()
    assert torch.equal(pick(eager, "triton", device)(x), eager(x))


@pytest.mark.parametrize("columns", [5, 64, 150])
def test_one_triangle_gives_both(columns: int, device: torch.device) -> None:
    """An addend that is not symmetric stands for a product whose sums are not in the same order on both sides."""
    x = torch.randn(20, columns, device=device).bfloat16()
    lower = torch.randn(columns, columns, device=device).bfloat16().tril()
    addend = lower + torch.full_like(lower, 1e3).triu(1)
    kernel = pick(eager, "triton", device)
    assert torch.equal(kernel(x, addend), kernel(x, lower + lower.tril(-1).T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_other_dtypes_stay_with_torch(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(9, 5, dtype=dtype, device=device)
    assert torch.equal(pick(eager, "triton", device)(x, alpha=0.5), eager(x, alpha=0.5))


def test_trion_is_the_same_on_both_backends(device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(12, 7, device=device)) for _ in range(2)]
    optimizers = [Trion([p], rank=3, backend=b) for p, b in zip(params, ("eager", "triton"))]
    for _ in range(3):
        grad = torch.randn(12, 7, device=device)
        for p, optimizer in zip(params, optimizers):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-4, atol=1e-6)


def test_cublas_takes_every_size_at_which_it_was_faster() -> None:
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    lost = [
        int(row["name"].split()[-1]) for row in rows if row.get("cublas_ms", 0) > 0 and row["cublas_ms"] < row["ms"]
    ]
    assert lost and max(lost) < SYMMETRIC_FROM
