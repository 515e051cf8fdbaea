"""SLTrain's kernels against fp64, relative to the error of the eager operations, in all packings of the support."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.nn import SLTrain
from lowrank_optim.ops import pick
from lowrank_optim.ops.sddmm import sddmm
from lowrank_optim.ops.sltrain import sltrain_weight
from lowrank_optim.ops.support import draw_positions, empty_support, pack_
from tests.conformance import FP32_AND_SLOW_BF16

# Older versions cannot compile one of the two kernels.
triton = pytest.importorskip("triton", "3.3")
# (m, n), sparsity; the packing that these make the smallest.
SUPPORTS = [
    ((5, 5461), 0.03, "columns"),
    ((70, 300), 0.05, "columns"),
    ((701, 9), 0.02, "flat"),
    ((65, 129), 0.3, "bitmap"),
    ((3, 7), 0.5, "bitmap"),
    ((40, 200), 0.0, "flat"),
]


def support(shape: tuple[int, int], sparsity: float, packing: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    count = int(sparsity * shape[0] * shape[1])
    index, row_pointers = empty_support(shape, count, None)
    found = "flat" if index.dtype != torch.uint8 else "columns" if row_pointers.numel() else "bitmap"
    assert found == packing
    pack_(index, row_pointers, draw_positions(shape, count), shape)
    return index.to(device), row_pointers.to(device), count


def sddmm_kernel(device: torch.device) -> Any:
    return pick(sddmm, "triton", device)


def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # Half more than the eager error: another order of the sums.
    error = (ours.double() - exact).norm()
    assert error <= 1.5 * (theirs.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
@pytest.mark.parametrize(("shape", "sparsity", "packing"), SUPPORTS, ids=str)
def test_weight(
    shape: tuple[int, int], sparsity: float, packing: str, dtype: torch.dtype, device: torch.device
) -> None:
    (m, n), r = shape, 5
    index, row_pointers, count = support(shape, sparsity, packing, device)
    parts = [torch.randn(*size, device=device).to(dtype) for size in ((m, r), (r, n), (count,))]
    ours = pick(sltrain_weight, "triton", device)(*parts, index, row_pointers, scale=0.4)
    theirs = sltrain_weight(*parts, index, row_pointers, scale=0.4)
    check(ours, theirs, sltrain_weight(*(part.double() for part in parts), index, row_pointers, scale=0.4))


@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
@pytest.mark.parametrize("tokens", [0, pytest.param(1, marks=pytest.mark.slow), 45])
@pytest.mark.parametrize(("shape", "sparsity", "packing"), SUPPORTS, ids=str)
def test_sddmm(
    shape: tuple[int, int], sparsity: float, packing: str, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    index, row_pointers, count = support(shape, sparsity, packing, device)
    grad, x = (torch.randn(tokens, size, device=device).to(dtype) for size in shape)
    ours = sddmm_kernel(device)(grad, x, index, row_pointers, count=count)
    theirs = sddmm(grad, x, index, row_pointers, count=count)
    check(ours, theirs, sddmm(grad.double(), x.double(), index, row_pointers, count=count))


def test_full_and_empty_rows(device: torch.device) -> None:
    # More entries a row than a tile takes at once, first and last columns, rows without any.
    shape = (130, 300)
    flat = torch.cat([torch.arange(300), 128 * 300 + torch.arange(0, 300, 299)])
    index, row_pointers = torch.empty(2 * len(flat), dtype=torch.uint8), torch.empty(131, dtype=torch.int32)
    pack_(index, row_pointers, flat, shape)
    index, row_pointers, flat = index.to(device), row_pointers.to(device), flat.to(device)
    B, A = torch.randn(130, 3, device=device), torch.randn(3, 300, device=device)
    W = pick(sltrain_weight, "triton", device)(B, A, flat.float(), index, row_pointers, scale=1.0)
    S = (W - B @ A).view(-1)
    torch.testing.assert_close(S[flat], flat.float(), rtol=1e-5, atol=1e-5)
    assert int((S.abs() > 1e-4).sum()) == len(flat) - 1
    entries = sddmm_kernel(device)(B.T, A, index, row_pointers, count=len(flat))
    torch.testing.assert_close(entries, (B @ A).view(-1)[flat], rtol=1e-5, atol=1e-5)


def test_expanded_and_strided_gradients(device: torch.device) -> None:
    index, row_pointers, count = support((70, 300), 0.05, "columns", device)
    x = torch.randn(300, 20, device=device).T
    grad = torch.ones((), device=device).expand(20, 70)
    ours = sddmm_kernel(device)(grad, x, index, row_pointers, count=count)
    torch.testing.assert_close(ours, sddmm(grad, x, index, row_pointers, count=count), rtol=1e-4, atol=1e-4)


def test_a_layer_is_the_same_with_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SLTrain(rank=4, sparsity=0.1).build(40, 70, bias=True, device=device)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(6, 40, device=device)

    def results() -> list[Tensor]:
        leaves = [x.requires_grad_(), *layer.parameters()]
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected = results()
    kernel = sddmm_kernel(device)
    operations = importlib.import_module("lowrank_optim.ops.sltrain")
    monkeypatch.setattr(operations, "sltrain_weight", pick(sltrain_weight, "triton", device))
    monkeypatch.setattr(operations, "sddmm", kernel)
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fp64_stays_with_torch(device: torch.device) -> None:
    index, row_pointers, count = support((70, 300), 0.05, "columns", device)
    B, A = torch.randn(70, 4, device=device).double(), torch.randn(4, 300, device=device).double()
    arguments: Any = (B, A, torch.randn(count, device=device).double(), index, row_pointers)
    ours = pick(sltrain_weight, "triton", device)(*arguments, scale=1.0)
    assert torch.equal(ours, sltrain_weight(*arguments, scale=1.0))
    entries = sddmm_kernel(device)(B.T, A, index, row_pointers, count=count)
    assert torch.equal(entries, sddmm(B.T, A, index, row_pointers, count=count))
