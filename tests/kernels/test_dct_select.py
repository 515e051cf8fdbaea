"""Selecting and moving columns by kernel as by the eager operations."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim import DCTAdamW
from lowrank_optim.ops import pick
from lowrank_optim.ops.dct_select import dct_select
from lowrank_optim.ops.move_columns import move_columns_
from tests.conformance import nightly


@pytest.mark.parametrize("ell_norm", [1, 2])
@pytest.mark.parametrize("shape", [(5461, 9), (513, 300), (1, 130), (0, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", *nightly("transposed", "padded")])
def test_selects_the_same_columns(shape: tuple[int, int], ell_norm: int, layout: str, device: torch.device) -> None:
    rows, columns = shape
    # Norms far enough apart that no rounding changes their order; the first two are equal.
    scored = torch.randn(rows, columns, device=device).sign() * (torch.randperm(columns, device=device) + 1)
    if columns > 2:
        scored[:, 1] = scored[:, 0]
    if layout == "transposed":
        scored = scored.T.contiguous().T
    elif layout == "padded":
        scored = torch.cat([scored, torch.full_like(scored, float("nan"))], dim=1)[:, :columns]
    for rank in {1, (columns + 1) // 2, columns}:
        ours = pick(dct_select, "triton", device)(scored, rank, ell_norm=ell_norm)
        assert torch.equal(ours, dct_select(scored, rank, ell_norm=ell_norm))


@pytest.mark.parametrize("ell_norm", [1, 2])
def test_keeps_as_much_as_in_fp64(ell_norm: int, device: torch.device) -> None:
    scored = torch.randn(700, 200, device=device)
    exact = scored.double().norm(ell_norm, dim=0).pow(ell_norm)
    kept = exact[pick(dct_select, "triton", device)(scored, 40, ell_norm=ell_norm)].sum()
    assert kept >= exact.topk(40).values.sum() * (1 - 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_stay_with_torch(dtype: torch.dtype, device: torch.device) -> None:
    scored = torch.randn(30, 12, dtype=dtype, device=device)
    ours = pick(dct_select, "triton", device)(scored, 4, ell_norm=2)
    assert torch.equal(ours, dct_select(scored, 4, ell_norm=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(5461, 3), (37, 130), (3, 4100), (1, 1), (0, 4)], ids=str)
def test_moves_columns(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    matrix = torch.randn(shape, device=device).to(dtype)
    columns = shape[1]
    source = torch.randperm(columns, device=device)
    source[torch.rand(columns, device=device) < 0.3] = -1
    for strided in (False, True):
        ours, theirs = (matrix.T.contiguous().T if strided else matrix.clone() for _ in range(2))
        pick(move_columns_, "triton", device)(ours, source)
        move_columns_(theirs, source)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_whole_optimizer_is_the_same_on_both_backends(state_dtype: str, device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(12, 7, device=device)) for _ in range(2)]
    optimizers = [
        DCTAdamW([p], rank=3, backend=b, state_dtype=state_dtype) for p, b in zip(params, ("eager", "triton"))
    ]
    for _ in range(4):
        grad = torch.randn(12, 7, device=device)
        for p, optimizer in zip(params, optimizers):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-7)
