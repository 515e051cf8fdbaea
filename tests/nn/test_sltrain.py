"""The SLTrain layer: sizes, start, support, options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim.nn import SLTrain, SLTrainLinear, convert, reset_parameters
from lowrank_optim.nn.convert import layer_generator
from tests.nn.parameterizations import block


def test_llama_60m_holds_the_published_number_of_parameters() -> None:
    pytest.importorskip("transformers", reason="the presets need lowrank-optim[train]")
    from lowrank_optim.pretrain.llama import build_config, build_model

    model = build_model(build_config("llama_60m"), device="meta", dtype=torch.bfloat16)
    convert(model, SLTrain(rank=128, sparsity=0.03, alpha=32))
    assert sum(p.numel() for p in model.parameters()) == 43_529_832
    layers = [m for m in model.modules() if isinstance(m, SLTrainLinear)]
    assert len(layers) == 8 * 7
    values = sum(layer.values.numel() for layer in layers)
    pointers = sum(layer.out_features + 1 for layer in layers)
    assert values == sum(int(0.03 * layer.out_features * layer.in_features) for layer in layers) == 758_888
    # Two bytes a value and four a row, where the published code holds eight a value.
    assert sum(b.nbytes for layer in layers for b in layer.buffers()) == 2 * values + 4 * pointers


@pytest.mark.parametrize("shape", [(5461, 48), (48, 5461), (30, 20)])
def test_starts_as_published(shape: tuple[int, int]) -> None:
    m, n = shape
    layer = SLTrain(rank=8, sparsity=0.03, alpha=32).build(n, m, bias=True)
    assert layer.values.numel() == int(0.03 * m * n)
    assert layer.scale == 4
    assert not layer.B.any()
    for part in (layer.A, layer.values):
        assert part.abs().max() <= n**-0.5
        deviation = (3 * n) ** -0.5
        assert abs(float(part.detach().std()) - deviation) < 4 * deviation / part.numel() ** 0.5
    assert layer.bias is not None
    assert layer.bias.abs().max() <= n**-0.5


def test_at_the_start_only_b_and_the_values_have_a_gradient() -> None:
    layer = SLTrain(rank=4, sparsity=0.1).build(16, 24)
    x = torch.randn(50, 16, requires_grad=True)
    layer(x).sin().sum().backward()
    assert layer.A.grad is not None
    assert layer.B.grad is not None
    assert layer.values.grad is not None
    assert x.grad is not None
    assert not layer.A.grad.any()
    assert layer.B.grad.any(1).all()
    assert layer.values.grad.all()
    assert x.grad.any()


def test_the_support_depends_on_seed_and_position_alone() -> None:
    def supports(model: nn.Module) -> list[torch.Tensor]:
        return [layer.support() for layer in model.modules() if isinstance(layer, SLTrainLinear)]

    models = [block(), block().bfloat16(), block()]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        convert(model, SLTrain(rank=4, sparsity=0.1), seed=seed)
    first, again, other = map(supports, models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # Two layers of one shape differ.
    assert not torch.equal(first[0], first[3])


def test_meta_device_then_reset_equals_a_direct_conversion() -> None:
    torch.manual_seed(0)
    direct = block()
    convert(direct, SLTrain(rank=4, sparsity=0.1), seed=5)
    with torch.device("meta"):
        model = block()
    convert(model, SLTrain(rank=4, sparsity=0.1), seed=5)
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 11)
    model.to_empty(device="cpu")
    reset_parameters(model, seed=5)
    for name, layer in direct.named_modules():
        if isinstance(layer, SLTrainLinear):
            for key, value in layer.state_dict().items():
                if key != "bias":
                    assert torch.equal(value, model.get_submodule(name).state_dict()[key])


def test_a_saved_support_replaces_the_drawn_one() -> None:
    options = SLTrain(rank=4, sparsity=0.1)
    a, b = (options.build(16, 24, generator=layer_generator(0, position)) for position in (0, 1))
    assert not torch.equal(a.support(), b.support())
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(a.support(), b.support())
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("alpha", [8, None])
def test_keeps_a_weight_of_its_own_kind_and_the_most_of_any(alpha: float | None) -> None:
    layer = SLTrain(rank=4, sparsity=0.1, alpha=alpha).build(40, 30)
    low = torch.randn(30, 4) @ torch.randn(4, 40)
    layer.from_weight_(low)
    torch.testing.assert_close(layer.dense_weight(), low, rtol=1e-4, atol=1e-4)
    dense = torch.randn(30, 40)
    layer.from_weight_(dense)
    kept = layer.dense_weight()
    singular = torch.linalg.svdvals(dense)
    assert float((kept - dense).norm()) < float(singular[4:].norm())
    support = layer.support().long()
    torch.testing.assert_close(kept.view(-1)[support], dense.view(-1)[support], rtol=1e-4, atol=1e-4)


def test_dense_weight_is_what_the_layer_multiplies_by() -> None:
    layer = SLTrain(rank=4, sparsity=0.1, alpha=8).build(33, 27, bias=True)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 1, 33)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    assert layer.dense_weight().dtype == torch.float32
    # Rounded once from fp32, not summed in bf16.
    halved = SLTrain(rank=4, sparsity=0.1, alpha=8).build(33, 27, dtype=torch.bfloat16)
    nn.init.normal_(halved.B)
    wide = SLTrain(rank=4, sparsity=0.1, alpha=8).build(33, 27)
    wide.load_state_dict(halved.state_dict())
    assert torch.equal(halved.dense_weight(), wide.dense_weight().bfloat16())


def test_a_matrix_too_small_for_one_value_is_plain_low_rank() -> None:
    layer = SLTrain(rank=2, sparsity=0.03, alpha=2).build(5, 5)
    nn.init.normal_(layer.B)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), x @ (layer.B @ layer.A).T)
    layer(x).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "Invalid rank: 0, expected a positive int"),
        ({"rank": 2.0}, "Invalid rank: 2.0"),
        ({"sparsity": 1.0}, "Invalid sparsity: 1.0, expected a number above 0 and below 1"),
        ({"sparsity": 0}, "Invalid sparsity: 0"),
        ({"sparsity": float("nan")}, "Invalid sparsity: nan"),
        ({"sparsity": "0.03"}, "Invalid sparsity: '0.03'"),
        ({"alpha": 0}, "Invalid alpha: 0"),
        ({"alpha": -8}, "Invalid alpha: -8"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTrain(**options)  # type: ignore[arg-type]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="Invalid rank: 21, expected at most 20"):
        SLTrain(rank=21).build(20, 30)
    layer = SLTrain(rank=4, sparsity=0.1).build(20, 30)
    with pytest.raises(ValueError, match=r"Invalid weight: shape \(20, 30\), expected \(30, 20\)"):
        layer.from_weight_(torch.zeros(20, 30))
    model = block()
    convert(model, SLTrain(rank=4))
    with pytest.raises(ValueError, match="already a SLTrainLinear"):
        convert(model, SLTrain(rank=4))
