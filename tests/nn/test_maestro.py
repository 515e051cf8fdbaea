"""Maestro: ordered dropout finds the SVD, and the lasso cuts what nothing is left for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.nn import LowRank, Maestro, MaestroLinear, OrderedDropout, convert
from lowrank_optim.nn.maestro import shrink_tails_, tail_norms
from tests.nn.parameterizations import block


def target(spectrum: list[float], rows: int = 6) -> Tensor:
    """A matrix (rows, len(spectrum)) of these singular values."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return (u * torch.tensor(spectrum, dtype=torch.float64)) @ v.T


def fit(W: Tensor, steps: int, rate: float, **options: Any) -> MaestroLinear:
    """Train a layer of full width towards W on whitened inputs, exactly: the unit vectors."""
    m, n = W.shape
    model = nn.Sequential(Maestro(std=0.3).build(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    dropout = OrderedDropout(model, optimizer, seed=2, **options)
    x = torch.eye(n, dtype=torch.float64)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (model(x) - W.T).square().sum().backward()
        optimizer.step()
        dropout.after_step(step)
    layer = model[0]
    assert isinstance(layer, MaestroLinear)
    return layer


def test_ordered_dropout_recovers_the_svd() -> None:
    """arXiv 2308.14929, theorem 4.1: cut at any width, the factors are the best approximation of that rank."""
    W = target([2.0, 1.5, 1.1, 0.8])
    layer = fit(W, 2500, 0.05, lasso=0.0)
    u, s, v = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        for b in range(1, 5):
            nearest = (u[:, :b] * s[:b]) @ v[:b]
            found = layer.B[:, :b] @ layer.A[:b]
            assert float((found - nearest).norm() / nearest.norm()) < 1e-3
    assert layer.rank == 4


def test_the_lasso_shrinks_the_rank_to_that_of_the_target() -> None:
    W = target([2.0, 1.2, 0.0, 0.0, 0.0])
    layer = fit(W, 600, 0.05, lasso=0.02, every=100)
    assert layer.rank == 2 and int(layer.kept) == 2
    assert not layer.A[2:].any() and not layer.B[:, 2:].any()
    error = (layer.dense_weight() - W).norm() / W.norm()
    # What the penalty takes from the values that stay.
    assert float(error) < 0.05


def test_what_is_cut_is_next_to_nothing() -> None:
    layer = Maestro(rank=4).build(7, 5)
    with torch.no_grad():
        layer.A[2:] *= 1e-3
        layer.B[:, 2:] *= 1e-3
    model = nn.Sequential(layer)
    before, dropout = layer(torch.eye(7)), OrderedDropout(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dropout.restart_()
    assert layer.rank == 2
    torch.testing.assert_close(layer(torch.eye(7)), before, rtol=0, atol=1e-6)


def test_the_whole_width_is_a_low_rank_layer() -> None:
    layer, low = Maestro(rank=3).build(7, 5), LowRank(rank=3).build(7, 5)
    low.load_state_dict({"A": layer.A, "B": layer.B})
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), low(x))
    layer.width = 2
    assert torch.equal(layer(x), x @ layer.A[:2].T @ layer.B[:, :2].T)
    assert torch.equal(layer.eval()(x), low(x))


def test_cut_components_stay_cut_through_a_checkpoint() -> None:
    layer, other = Maestro(rank=4).build(7, 5), Maestro(rank=4).build(7, 5)
    layer.shrink_(2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 7)
    assert other.rank == other.width == 2 and torch.equal(other(x), layer(x))
    other(x).sum().backward()
    assert other.A.grad is not None and not other.A.grad[2:].any()
    with torch.no_grad():
        # As the momentum of an optimizer may do.
        other.A += 1
    torch.testing.assert_close(other(x), nn.functional.linear(x, other.dense_weight()))
    other.reset_parameters()
    assert other.rank == 4 == int(other.kept)


def test_widths_come_from_the_seed_and_the_step() -> None:
    def widths(seed: int, steps: range) -> list[tuple[int, ...]]:
        model = block()
        convert(model, Maestro(rank=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        dropout = OrderedDropout(model, optimizer, lasso=0.0, seed=seed)
        drawn = []
        for step in steps:
            dropout.after_step(step)
            drawn.append(tuple(layer.width for layer in dropout.layers))
        return drawn

    drawn = widths(3, range(1, 201))
    assert drawn[100:] == widths(3, range(101, 201)) and drawn != widths(4, range(1, 201))
    # One layer at a time, and every pair of a layer and a width below its rank.
    assert all(sum(width < 4 for width in step) <= 1 for step in drawn)
    assert {(i, width) for step in drawn for i, width in enumerate(step) if width < 4} == {
        (i, width) for i in range(4) for width in (1, 2, 3)
    }
    with pytest.raises(ValueError, match="holds no MaestroLinear"):
        OrderedDropout(block(), torch.optim.SGD(block().parameters(), lr=0.1))


def test_the_proximal_step_is_the_minimum() -> None:
    """Of |X - Y|² / 2 + size Σ_k |X[k:]|: no small change makes it less."""
    torch.manual_seed(0)
    Y = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([[3.0], [1.0], [0.5], [0.4], [0.01]])
    X = Y.clone()
    shrink_tails_(X, 0.1)

    def value(candidate: Tensor) -> float:
        return float((candidate - Y).square().sum() / 2 + 0.1 * tail_norms(candidate).sum())

    assert not X[4].any() and X[0].any()
    least = value(X)
    assert all(value(X + 1e-3 * torch.randn_like(X)) > least for _ in range(200))
    # Towards what it was before, too.
    assert all(value(X + share * (Y - X)) > least for share in (1e-3, 0.1, 1.0))
    zeros = torch.zeros(3, 2)
    shrink_tails_(zeros, 0.1)
    assert not zeros.any()
