"""What every parameterization promises; tests/nn/parameterizations.py is the table."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.nn import FactoredLinear, convert, merge, reset_parameters
from tests.conformance import nightly
from tests.nn.parameterizations import MORE, TARGETS, VARIANTS, block, train

ROOT = Path(__file__).resolve().parents[2]
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name: str, n: int = 10, m: int = 14, dtype: torch.dtype = torch.float64, bias: bool = True) -> FactoredLinear:
    """A layer all of whose parts matter: zero parts are filled."""
    generator = torch.Generator().manual_seed(0)
    layer = VARIANTS[name].options.build(n, m, bias=bias, device="cpu", dtype=dtype, generator=generator)
    with torch.no_grad():
        for p in layer.parameters():
            if not p.any():
                p.normal_(0, 0.3, generator=generator)
    return layer


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def linear(layer: FactoredLinear) -> bool:
    return not layer.nonlinear


@every_variant
@pytest.mark.parametrize("shape", [(2, 3, 6), (1, 6), *nightly(((3, 6),))], ids=str)
def test_gradients_are_those_of_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    if VARIANTS[name].straight_through:
        pytest.skip("straight-through")
    layer = build(name, 6, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values)), (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, *trained(layer)), atol=1e-8)


@every_variant
def test_the_dense_weight_computes_what_the_layer_does(name: str) -> None:
    layer = build(name, dtype=torch.float32)
    if layer.nonlinear:
        with pytest.raises(RuntimeError, match="activation"):
            layer.dense_weight()
        return
    x = torch.randn(5, 10)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias), rtol=0, atol=1e-5)


@every_variant
def test_gradients_equal_those_through_the_dense_weight(name: str) -> None:
    layer = build(name)
    if layer.nonlinear:
        pytest.skip("no dense weight")
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 14, dtype=torch.float64)
    (gx,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(gx, g @ layer.dense_weight(), rtol=1e-12, atol=1e-12)


@every_variant
def test_no_dense_tensor_is_saved_for_backward(name: str) -> None:
    n, m = 40, 56
    layer = build(name, n, m, torch.float32)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, n, requires_grad=True)).sum().backward()
    copies = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert saved
    assert all(t.numel() < m * n for t in copies), "a dense tensor is saved"
    if not VARIANTS[name].dense:
        assert all(t.numel() < m * n for t in saved)
    # What is saved beside parameters is as wide as the batch (3 rows) or an index: no scaled copy of a factor.
    assert not any(t.is_floating_point() and t.numel() >= min(m, n) * 4 for t in copies)


class Runs(NamedTuple):
    """Losses by variant: of 100 updates, of some more, and of the same after loading in a new process."""

    first: dict[str, list[float]]
    next: dict[str, list[float]]
    continued: dict[str, list[float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs, saved = Runs({}, {}, {}), {}
    for name, variant in VARIANTS.items():
        model = block()
        convert(model, variant.options)
        optimizer = variant.optimizer(model)
        restarts = variant.restarts(model, optimizer)
        runs.first[name] = train(model, optimizer, 0, 100, restarts)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved[name] = copy.deepcopy({**state, "restarts": [restart.state_dict() for restart in restarts]})
        runs.next[name] = train(model, optimizer, 100, MORE, restarts)
    path = tmp_path_factory.mktemp("runs") / "saved.pt"
    torch.save(saved, path)
    # One process for all, because importing torch takes longer than everything else.
    answer = subprocess.run(
        [sys.executable, "-m", "tests.nn.continue_run", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=True,
    )
    for name, losses in json.loads(answer.stdout).items():
        runs.continued[name] = [float.fromhex(loss) for loss in losses]
    return runs


@pytest.mark.slow
@every_variant
def test_training_continues_in_a_new_process_to_the_last_bit(name: str, runs: Runs) -> None:
    assert runs.first[name][-1] < 0.9 * runs.first[name][0]
    assert runs.continued[name] == runs.next[name]


@every_variant
def test_a_merged_model_has_the_same_logits(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    train(model, torch.optim.AdamW(trained(model), lr=1e-2), 0, 20)
    ids = torch.arange(11)[None]
    before = model(ids)
    if any(layer.nonlinear for layer in model.modules() if isinstance(layer, FactoredLinear)):
        with pytest.raises(RuntimeError, match="activation"):
            merge(model)
        assert torch.equal(model(ids), before)
        return
    assert merge(model) is model
    assert [n for n, m in model.named_modules() if type(m) is nn.Linear] == [*TARGETS, "lm_head"]
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-4)
    # Plain again, so that a dense model loads it.
    block().load_state_dict(model.state_dict())


@every_variant
def test_meta_conversion_starts_as_a_real_one(name: str) -> None:
    real, meta = block(), block().to("meta")
    assert convert(real, VARIANTS[name].options, seed=5) == TARGETS
    assert convert(meta, VARIANTS[name].options, seed=5) == TARGETS
    assert all(t.is_meta for t in meta.state_dict().values())
    meta.to_empty(device="cpu")
    for tensor in meta.state_dict().values():
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(1)
    reset_parameters(meta, seed=5)
    expected = real.state_dict()
    for key, tensor in meta.state_dict().items():
        assert expected[key].dtype == tensor.dtype
        if key.startswith(("attn", "mlp")) and not key.endswith("bias"):
            assert torch.equal(tensor, expected[key]), key


@every_variant
def test_a_layer_draws_from_the_seed_and_its_position(name: str) -> None:
    first, second, partial = block(), block(), block()
    convert(first, VARIANTS[name].options, seed=1)
    torch.rand(7)
    convert(second, VARIANTS[name].options, seed=1)
    convert(partial, VARIANTS[name].options, targets="mlp", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    for key, tensor in partial.mlp.state_dict().items():
        assert torch.equal(tensor, first.mlp.state_dict()[key])
    other = block()
    convert(other, VARIANTS[name].options, seed=2)
    names = [n for n, _ in first.mlp["up_proj"].named_parameters() if n != "bias"]
    key = "A" if "A" in names else names[0]
    assert not torch.equal(getattr(other.mlp["up_proj"], key), getattr(first.mlp["up_proj"], key))


@every_variant
@pytest.mark.parametrize(("n", "m", "tokens"), [(5461, 9, 1), (9, 5461, 3)])
def test_odd_sizes_and_one_token(name: str, n: int, m: int, tokens: int) -> None:
    layer = build(name, n, m, torch.float32)
    x = torch.randn(tokens, n, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == (tokens, m)
    for p in (x, *trained(layer)):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()
    if linear(layer):
        torch.testing.assert_close(y, nn.functional.linear(x, layer.dense_weight(), layer.bias), rtol=1e-3, atol=1e-3)


@every_variant
def test_inputs_that_are_not_contiguous(name: str) -> None:
    layer = build(name, dtype=torch.float32)
    x = torch.randn(10, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@every_variant
def test_bf16_trains(name: str) -> None:
    layer = build(name, dtype=torch.bfloat16)
    x = torch.randn(4, 10, dtype=torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trained(layer))
    wide = copy.deepcopy(layer).double()
    torch.testing.assert_close(y.double(), wide(x.double()), rtol=0.05, atol=0.05 * y.abs().max().item())


@every_variant
def test_a_trained_weight_is_kept_as_well_as_possible(name: str) -> None:
    model = block()
    # A weight of low rank, which every parameterization can express.
    with torch.no_grad():
        up = model.mlp["up_proj"].weight
        up.copy_(torch.randn(17, 3) @ torch.randn(3, 12) / 12)
    dense, bias = up.clone(), model.mlp["up_proj"].bias
    x = torch.randn(64, 12)
    expected = nn.functional.linear(x, dense, bias)
    convert(model, VARIANTS[name].options, from_weight=True)
    layer = model.mlp["up_proj"]
    assert layer.bias is bias
    error = (layer(x) - expected).norm() / expected.norm()
    assert error < (VARIANTS[name].keeps or (0.1 if layer.nonlinear else 1e-5))


@every_variant
def test_gradients_accumulate_over_micro_batches(name: str) -> None:
    layer = build(name)
    x = torch.randn(6, 10, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole = [p.grad.clone() for p in trained(layer) if p.grad is not None]
    layer.zero_grad()
    for part in x.split(2):
        layer(part).square().sum().backward()
    assert whole
    for p, expected in zip(trained(layer), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


@every_variant
def test_a_converted_model_copies_and_compares(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    clone = copy.deepcopy(model)
    ids = torch.arange(11)[None]
    assert torch.equal(clone(ids), model(ids))
    assert "rank=4" in repr(model) or "rank" not in repr(VARIANTS[name].options)
