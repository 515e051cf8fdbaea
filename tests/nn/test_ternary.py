"""TernaryLowRank: three values forward, straight through backward, and the gated path."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_optim.nn import TernaryLowRank
from lowrank_optim.nn.ternary import ternary


def test_without_its_gate_or_its_factors_it_is_a_ternary_layer() -> None:
    layer = TernaryLowRank(rank=2).build(9, 7)
    x = torch.randn(4, 9)
    W = layer.weight.detach()
    gamma = W.abs().mean()
    expected = torch.where(W.abs() > gamma / 2, gamma * W.sign(), 0.0)
    torch.testing.assert_close(ternary(W, torch.float32), expected)
    assert len(ternary(W, torch.float32).unique()) == 3
    backbone = nn.functional.linear(x, ternary(W, torch.float32))
    # B starts as zero.
    assert torch.equal(layer(x), backbone)
    with torch.no_grad():
        layer.B.normal_()
        layer.gate.zero_()
    assert torch.equal(layer(x), backbone)


def test_gradients_are_those_of_the_formula_with_the_rounding_left_out() -> None:
    layer = TernaryLowRank(rank=2, gate=0.3).build(9, 7, bias=True, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 4, 7, dtype=torch.float64)
    (layer(x) * y).sum().backward()
    ours = [p.grad.clone() for p in (x, *layer.parameters()) if p.grad is not None]
    layer.zero_grad()
    x.grad = None
    W = layer.weight + (ternary(layer.weight, torch.float64) - layer.weight).detach()
    plain = nn.functional.linear(x, W + layer.gate.tanh() * layer.B @ layer.A, layer.bias)
    torch.testing.assert_close(checkpoint(layer, x, use_reentrant=False), plain)
    (plain * y).sum().backward()
    assert len(ours) == 6
    for grad, p in zip(ours, (x, *layer.parameters())):
        torch.testing.assert_close(grad, p.grad)


def test_a_ternary_weight_and_a_remainder_of_low_rank_are_kept_exactly() -> None:
    torch.manual_seed(0)
    layer = TernaryLowRank(rank=2, gate=0.5).build(9, 7, dtype=torch.float64)
    W = torch.randn(7, 9, dtype=torch.float64)
    layer.from_weight_(W)
    missed = W - ternary(W, torch.float64)
    error = (layer.dense_weight() - W).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(missed)[2:].square().sum())
    whole = TernaryLowRank(rank=7, gate=0.5).build(9, 7, dtype=torch.float64)
    whole.from_weight_(W)
    torch.testing.assert_close(whole.dense_weight(), W)
    closed = TernaryLowRank(rank=7, gate=0.0).build(9, 7, dtype=torch.float64)
    closed.from_weight_(W)
    assert torch.equal(closed.dense_weight(), ternary(W, torch.float64))


def test_weights_of_zero_stay_finite_and_gates_are_checked() -> None:
    layer = TernaryLowRank(rank=2).build(9, 7)
    layer.from_weight_(torch.zeros(7, 9))
    assert torch.equal(layer(torch.randn(3, 9)), torch.zeros(3, 7))
    for gate in (1.0, -1, True, "half"):
        with pytest.raises(ValueError, match="Invalid gate"):
            TernaryLowRank(gate=gate)  # type: ignore[arg-type]
