"""The benchmark of the layers: its rival is the published formulation, and its memory figures are true."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory_probe import peak_bytes
from benchmarks.parameterizations import PublishedSLTrain, Shape, candidates, measure
from lowrank_optim.nn import SLTrainLinear

CPU = torch.device("cpu")


def test_the_published_formulation_computes_what_ours_does() -> None:
    layers = candidates(Shape("odd", 37, 29, 4), CPU, torch.float64)
    ours, published = layers["sltrain"], layers["sltrain published"]
    assert isinstance(ours, SLTrainLinear)
    assert isinstance(published, PublishedSLTrain)
    x = torch.randn(50, 29, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(50, 37, dtype=torch.float64)
    leaves = [x, ours.B, ours.A, ours.values]
    a, b = (torch.autograd.grad(layer(x), leaves, direction) for layer in (ours, published))
    for ours_grad, published_grad in zip(a, b, strict=True):
        torch.testing.assert_close(ours_grad, published_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_sltrain_needs_one_dense_matrix_less_and_holds_nothing() -> None:
    shape = Shape("square", 256, 256, 8)
    rows = measure(shape, 160, 0.0, CPU, torch.float32)["layers"]
    dense = 4 * shape.m * shape.n
    saved = rows["sltrain published"]["peak_bytes"] - rows["sltrain"]["peak_bytes"]
    assert 0.7 * dense < saved < 1.3 * dense
    assert rows["sltrain published"]["held_bytes"] == 4 * shape.rank * shape.n
    assert rows["sltrain"]["held_bytes"] == rows["lost"]["held_bytes"] == rows["dense"]["held_bytes"] == 0
    assert rows["low rank"]["held_bytes"] == 4 * 160 * shape.rank
    assert rows["lost"]["peak_bytes"] < rows["dense"]["peak_bytes"]
    assert rows["dense"]["times_dense"] == 1.0
    assert rows["sltrain"]["seconds"]["n"] >= 3


def test_peak_counts_storages_while_they_live() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b * 2
        del b
        return c.view(10, 100).t()[:50]

    assert peak_bytes(run, CPU) == 8000
