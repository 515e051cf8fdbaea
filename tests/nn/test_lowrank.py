from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim.nn import LORO, CoLA, LoRA, LowRank, Parameterization, ReLoRA, convert
from lowrank_optim.pretrain.llama import build_config, build_model
from tests.nn.parameterizations import block, train


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRank(rank=0), "Invalid rank: 0"),
        (lambda: LowRank(rank=2.5), "Invalid rank: 2.5"),
        (lambda: LowRank(alpha=0), "Invalid alpha: 0"),
        (lambda: LowRank(init="orthogonal"), "Invalid init: 'orthogonal', expected one of 'normal'"),
        (lambda: LowRank(std=-1), "Invalid std: -1"),
        (lambda: CoLA(act="gelu"), "Invalid act: 'gelu'"),
        (lambda: LoRA(dropout=1.0), r"Invalid dropout: 1.0, expected a number in \[0, 1\)"),
        (lambda: ReLoRA(rank=-1), "Invalid rank: -1"),
        (lambda: LORO(rank=8).build(7, 9), "Invalid rank: 8, expected at most 7"),
        (lambda: LoRA(rank=2).build(0, 9), "Invalid in_features: 0"),
        (lambda: LoRA(rank=2).build(4, 9).from_weight_(torch.zeros(4, 9)), r"Invalid weight: shape \(4, 9\)"),
    ],
)
def test_options_out_of_range(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Parameter counts of SLTrain's and GaLore's C4 experiments, in units.
@pytest.mark.parametrize(
    ("size", "rank", "parameters"),
    [
        ("llama_60m", 128, 42_770_944),
        ("llama_130m", 256, 93_997_824),
        ("llama_350m", 256, 185_222_144),
        ("llama_1b", 512, 609_310_720),
        ("llama_7b", 1024, 2_820_935_680),
    ],
)
def test_published_parameter_counts(size: str, rank: int, parameters: int) -> None:
    model = build_model(build_config(size), device="meta")
    names = convert(model, LowRank(rank=rank))
    assert len(names) == 7 * model.config.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "std"),
    [
        (LowRank(rank=128), 0.02),
        (LowRank(rank=128, alpha=32), 0.02),
        # 1 / (3 sqrt(n)) times the scale alpha / r
        (LowRank(rank=128, alpha=64, init="kaiming"), 0.5 / (3 * 512**0.5)),
        # 0.02 sqrt(share of the energy in the 128 largest of 512 singular values)
        (LowRank(rank=128, init="spectral"), 0.0158),
        (LORO(rank=128), (4 * 128 / ((512 + 128) * (512 + 128))) ** 0.5),
        (CoLA(rank=128, act="none"), (512 + 512) ** -0.5),
    ],
)
def test_initial_deviations(options: Parameterization, std: float) -> None:
    layer = options.build(512, 512, bias=False, generator=torch.Generator().manual_seed(0))
    assert layer.dense_weight().std().item() == pytest.approx(std, rel=0.02)


def test_a_bias_starts_as_in_nn_linear() -> None:
    layer = LowRank(rank=4).build(400, 5000, bias=True)
    assert layer.bias is not None
    assert layer.bias.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    assert layer.bias.mean().abs() < 0.01


def test_lora_starts_as_its_frozen_weight() -> None:
    layer = LoRA(rank=4).build(30, 20)
    x = torch.randn(3, 30)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight))
    assert not layer.weight.requires_grad
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_lora_drops_inputs_of_its_factors_in_training_only() -> None:
    layer = LoRA(rank=4, dropout=0.5).build(30, 20)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 30)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T)


def test_relora_wakes_up_after_every_restart() -> None:
    model = block()
    convert(model, ReLoRA(rank=4))
    layer = model.mlp["up_proj"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for start in (0, 2):
        train(model, optimizer, start, 2)
        # The published wrapper zeroes both factors, after which neither ever has a gradient.
        assert layer.A.grad.norm() > 0 and layer.B.grad.norm() > 0
        before, old = layer.dense_weight(), layer.A.clone()
        layer.merge_and_restart_()
        torch.testing.assert_close(layer.dense_weight(), before)
        assert not layer.B.any() and not torch.equal(layer.A, old)


def test_cola_is_close_to_linear_after_from_weight() -> None:
    layer = CoLA(rank=6).build(20, 24)
    weight = torch.randn(24, 6) @ torch.randn(6, 20)
    layer.from_weight_(weight)
    x = torch.randn(100, 20)
    error = (layer(x) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 1e-4 < error < 0.1
