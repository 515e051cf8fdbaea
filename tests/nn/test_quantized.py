"""Quantized weights: a parameter of one element that optimizers train, and all that could make more of it."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lowrank_optim import GaLoreAdamW, QGaLoreAdamW8bit
from lowrank_optim.nn import Int4Linear, Int8Linear, QuantizedLinear, merge, merged_state_dict, quantize_weights
from lowrank_optim.nn.quantized import _compiled_input_gradient
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.sizes import tensor_bytes
from tests.conformance import nightly
from tests.nn.parameterizations import TARGETS, Block, block, train
from tests.optimizers import OPTIMIZERS, VARIANTS, build

IDS = torch.arange(11)[None]
LARGEST = {8: 127, 4: 7}
every_format = pytest.mark.parametrize("bits", [8, 4])


def quantized_block(bits: int = 8, dtype: torch.dtype = torch.float32) -> Block:
    """With whole groups and tails in a row, and rows shorter than a group; of 4 bits with half a byte unused."""
    model = block(width=40, hidden=300 if bits == 8 else 301).to(dtype)
    quantize_weights(model, bits=bits)
    return model


def dense_block(bits: int = 8) -> Block:
    return block(width=40, hidden=300 if bits == 8 else 301)


def layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def check_handles(model: nn.Module) -> None:
    """Every parameter of an int8 weight is one NaN, on the device of the codes, and knows them."""
    assert len(layers(model)) == 4
    for layer in layers(model):
        weight: Any = layer.weight
        assert weight.shape == (layer.out_features, layer.in_features)
        assert weight.device == layer.weight_codes.device
        assert weight.untyped_storage().nbytes() == weight.element_size()
        assert weight.is_meta or weight.isnan().all()
        assert layer.weight_codes.dtype == layer.format.dtype and layer.weight_scale.dtype == torch.float32
        codes, scale = weight.quantized_reference.parts()
        assert codes is layer.weight_codes and scale is layer.weight_scale


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items())
    return all(key == key2 and torch.equal(a, b) for (key, a), (key2, b) in pairs)


@every_format
def test_quantizing_takes_the_nearest_codes_and_merging_goes_back(bits: int) -> None:
    model = dense_block(bits)
    before = copy.deepcopy(model)
    model.attn["q_proj"].weight.requires_grad_(False)
    assert quantize_weights(model.eval(), bits=bits) == TARGETS
    check_handles(model)
    assert not layers(model)[0].training and not layers(model)[0].weight.requires_grad
    assert set(dict(model.named_parameters())) == set(dict(before.named_parameters()))
    for name in TARGETS:
        layer, linear = model.get_submodule(name), before.get_submodule(name)
        step = linear.weight.abs().max() / LARGEST[bits]
        assert (layer.dense_weight() - linear.weight).abs().max() <= 0.502 * step
    expected, exported = model(IDS), merged_state_dict(model)
    merge(model)
    assert torch.equal(model(IDS), expected)
    assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())


def test_a_linear_in_two_places_stays_one_and_mistakes_are_named() -> None:
    model = block()
    model.attn["o_proj"] = model.attn["q_proj"]
    quantize_weights(model)
    assert model.attn["o_proj"] is model.attn["q_proj"] and len(layers(model)) == 3
    with pytest.raises(ValueError, match="already a Int8Linear"):
        quantize_weights(model)
    with pytest.raises(ValueError, match="Invalid bits: 2, expected one of 8, 4"):
        quantize_weights(block(), bits=2)
    with pytest.raises(ValueError, match="Invalid targets"):
        quantize_weights(block(), "nothing")
    with pytest.raises(ValueError, match="Invalid weight"):
        Int8Linear(3, 4, weight=torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(3, 300), (1, 300), (2, 3, 300), (0, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_forward_and_gradients_are_those_of_the_dequantized_weight(
    shape: tuple[int, ...], dtype: torch.dtype, kind: type[QuantizedLinear]
) -> None:
    layer = kind(300, 20, bias=True, dtype=dtype)
    linear = merge(nn.Sequential(copy.deepcopy(layer)))[0]
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = torch.randn(shape, dtype=dtype).copy_(x.detach()).requires_grad_()
    for module, at in ((layer, x), (linear, y)):
        module(at).square().sum().backward()
    assert torch.equal(layer(x), linear(y))
    for ours, theirs in ((x, y), (layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.grad.dtype == dtype and ours.grad.is_contiguous()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_input_codes_and_scales_are_saved_for_backward() -> None:
    layer, saved = Int8Linear(300, 20, bias=True), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 300, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert {id(tensor) for tensor in saved} == {id(x), id(layer.weight_codes), id(layer.weight_scale)}


def test_autocast_and_checkpointing_compute_as_linear_does() -> None:
    model = quantized_block()
    dense = merge(copy.deepcopy(model))
    outputs = []
    for m in (model, dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(checkpoint(m, IDS, use_reentrant=False))
        outputs[-1].float().square().sum().backward()
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)
    ours, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    for name, p in ours.items():
        torch.testing.assert_close(p.grad, theirs[name].grad)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the compilers of older torch cannot ask about autocast")
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph_that_saves_no_dense_weight(bits: int) -> None:
    torch._dynamo.reset()
    model, saved = quantized_block(bits, torch.bfloat16), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    model(IDS).float().square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compiled(IDS)
    out.float().square().sum().backward()
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=0.05, atol=0.01)
    codes = layers(model)[0].format.dtype
    assert any(tensor.dtype == codes for tensor in saved)
    sizes = {layer.weight.numel() for layer in layers(model)}
    assert not any(t.is_floating_point() and t.numel() in sizes for t in saved)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_the_compiled_operation_passes_opcheck(kind: type[QuantizedLinear]) -> None:
    layer = kind(300, 20)
    torch.library.opcheck(_compiled_input_gradient, (torch.randn(3, 20), layer.weight_codes, layer.weight_scale, 300))


@every_format
def test_moving_and_casting_keep_one_element_and_fp32_scales(bits: int) -> None:
    model = quantized_block(bits)
    params = list(model.parameters())
    model(IDS).sum().backward()
    model.bfloat16()
    check_handles(model)
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())
    # As for any module: a parameter stays the object that an optimizer holds.
    assert all(p is q for p, q in zip(params, model.parameters()))
    model.zero_grad()
    check_handles(model.to("meta"))
    check_handles(model.to_empty(device="cpu"))


@every_format
def test_meta_and_fake_models_need_no_memory(bits: int) -> None:
    with torch.device("meta"):
        model = dense_block(bits)
    quantize_weights(model, bits=bits)
    check_handles(model)
    assert all(p.is_meta for p in model.parameters())
    model(IDS.to("meta")).sum().backward()
    assert all(layer.weight.grad.is_meta for layer in layers(model))
    real = quantized_block(bits)
    model.load_state_dict(real.state_dict(), assign=True)
    check_handles(model)
    assert torch.equal(model(IDS), real(IDS))
    with FakeTensorMode():
        fake = dense_block(bits)
        quantize_weights(fake, bits=bits)
        fake(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
        assert all(layer.weight.grad.shape == layer.weight.shape for layer in layers(fake))


@every_format
def test_bytes_are_those_of_codes_and_scales(bits: int) -> None:
    model = quantized_block(bits, torch.bfloat16)
    model(IDS).sum().backward()
    sizes = tensor_bytes(model, QGaLoreAdamW8bit(model.named_parameters(), rank=4))
    elements = {name: p.numel() for name, p in model.named_parameters()}
    quantized = sum(elements[f"{name}.weight"] for name in TARGETS)
    # Rows of 301 values in 151 bytes and three groups, of 300 values in two groups.
    codes, groups = (quantized, 460) if bits == 8 else (2 * 40 * 20 + 301 * 20 + 40 * 151, 40 + 40 + 301 + 40 * 3)
    assert sizes["weights"] == codes + 4 * groups + 2 * (sum(elements.values()) - quantized)
    assert sizes["gradients"] == 2 * sum(elements.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (8, torch.float32),
        *nightly((4, torch.float32), (8, torch.bfloat16), (4, torch.bfloat16)),
    ],
    ids=str,
)
def test_every_optimizer_trains_quantized_weights_as_it_trains_others(name: str, bits: int, dtype: torch.dtype) -> None:
    kwargs = next(kwargs for variant, kwargs in VARIANTS if variant == name)
    model, dense = quantized_block(bits, dtype), dense_block(bits).to(dtype)
    start = copy.deepcopy(model.state_dict())
    optimizers = [build(name, m.named_parameters(), **kwargs) for m in (model, dense)]
    ours, theirs = (train(m, optimizer, 0, 12) for m, optimizer in zip((model, dense), optimizers))
    assert ours[-1] < 0.95 * ours[0]
    assert abs(ours[-1] - theirs[-1]) < (0.02 if bits == 8 else 0.05) * ours[0]
    check_handles(model)
    # Embeddings, head, norms and biases are trained too; in bfloat16 an update of a norm may be too small to show.
    assert dtype == torch.bfloat16 or not any(
        torch.equal(value, start[key]) for key, value in model.state_dict().items()
    )
    for state in optimizers[0].state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.numel() > 1:
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.slow
def test_q_galore_follows_a_run_with_floating_point_weights() -> None:
    losses = []
    for quantized in (False, True):
        model = block(width=40, hidden=300)
        if quantized:
            quantize_weights(model)
        optimizer = QGaLoreAdamW8bit(model.named_parameters(), lr=3e-3, rank=8, update_proj_gap=20)
        losses.append(torch.tensor(train(model, optimizer, 0, 120)))
    assert losses[0][-1] < 0.3 * losses[0][0]
    assert ((losses[1] - losses[0]).abs() / losses[0]).max() < 0.05


@pytest.mark.parametrize("weight_rounding", ["nearest", "stochastic", "compensated"])
def test_weight_rounding_does_not_apply(weight_rounding: str) -> None:
    model = quantized_block(dtype=torch.bfloat16)
    optimizer = GaLoreAdamW([{"params": [p]} for p in model.parameters()], rank=4, weight_rounding=weight_rounding)
    train(model, optimizer, 0, 2)
    assert all("weight_correction" not in optimizer.state[layer.weight] for layer in layers(model))


def test_hooks_update_in_the_backward_pass() -> None:
    plain, hooked = quantized_block(), quantized_block()
    one, other = (GaLoreAdamW(m.named_parameters(), rank=4, lr=1e-2) for m in (plain, hooked))
    group_of = {id(p): group for group in other.param_groups for p in group["params"]}

    def update(p: Tensor) -> None:
        other.step_param(p, group_of[id(p)])
        p.grad = None

    for p in hooked.parameters():
        p.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        for model in (plain, hooked):
            model(IDS).square().mean().backward()
        one.step()
        one.zero_grad()
    assert equal_states(plain, hooked)


def save_and_load(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_format
@pytest.mark.parametrize("assign", [False, True])
def test_save_load_continue_is_bit_identical(assign: bool, bits: int) -> None:
    model = quantized_block(bits)
    optimizer = QGaLoreAdamW8bit(model.named_parameters(), rank=4, update_proj_gap=3)
    train(model, optimizer, 0, 5)
    assert not any(key.endswith("proj.weight") for key in model.state_dict())
    saved = save_and_load([model.state_dict(), optimizer.state_dict()])
    again = quantized_block(bits)
    again.load_state_dict(saved[0], assign=assign)
    check_handles(again)
    resumed = QGaLoreAdamW8bit(again.named_parameters(), rank=4, update_proj_gap=3)
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, 5, 5) == train(model, optimizer, 5, 5)
    assert equal_states(model, again)


def test_a_checkpoint_of_transformers_resumes_from_codes_and_exports_floats(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    from lowrank_optim.pretrain.llama import build_config, build_model
    from lowrank_optim.pretrain.weight_files import FACTORED, save_weights

    config = build_config("llama_9m")
    config.vocab_size = 64
    config.num_hidden_layers = 1
    model, again = (build_model(config, dtype=torch.bfloat16) for _ in range(2))
    quantize_weights(model)
    save_weights(model, tmp_path)
    exported = safetensors.load_file(tmp_path / "model.safetensors")
    quantize_weights(again)
    safetensors.load_model(again, tmp_path / FACTORED)
    assert equal_states(model, again)
    assert all(torch.equal(exported[key], value) for key, value in merge(model).state_dict().items())


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("model_first", [True, False])
def test_copies_of_model_and_optimizer_continue_alike(clone: Any, model_first: bool) -> None:
    model = quantized_block()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=4)
    train(model, optimizer, 0, 2)
    pair: tuple[Any, Any] = (model, optimizer) if model_first else (optimizer, model)
    theirs: tuple[Any, Any] = clone(pair)
    copied, its_optimizer = theirs if model_first else theirs[::-1]
    check_handles(copied)
    before = copy.deepcopy(model.state_dict())
    losses = train(copied, its_optimizer, 2, 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert losses == train(model, optimizer, 2, 3)
    assert equal_states(model, copied)


def test_an_optimizer_without_its_module_says_so() -> None:
    model = quantized_block()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=4)
    model(IDS).sum().backward()
    alone = pickled(optimizer)
    for group in alone.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match="module of a quantized weight is gone"):
        alone.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_other_optimizers_are_refused_in_words(options: dict[str, Any]) -> None:
    model = quantized_block()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    model(IDS).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW cannot write quantized weights"):
        optimizer.step()
    torch.optim.AdamW(block().parameters()).step()


def _replica(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = quantized_block()
    wrapped = nn.parallel.DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
    optimizer: LowRankOptimizer = GaLoreAdamW(model.named_parameters(), rank=4)
    for step in range(2):
        ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        wrapped(ids).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_replicas_of_distributed_data_parallel_stay_equal(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_replica, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not torch.equal(one["attn.q_proj.weight_codes"], quantized_block().state_dict()["attn.q_proj.weight_codes"])
