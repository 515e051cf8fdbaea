"""The torch.optim contract, for every public optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tests.conformance import every_variant, nightly
from tests.optimizers import OPTIMIZERS, VARIANTS, WITHOUT_RANK, accepts, build

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

# The last two have moments of more than 4096 values, compressed and not: smaller ones are never stored in 8 bits.
SHAPES = [(12, 7), (7, 12), (9, 9), (6, 5, 3, 3), (11,), (1, 8), (1030, 6), (4099,)]


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(2, *shape, generator=generator).to(dtype) for shape in SHAPES]
    return [nn.Parameter(d[0].clone()) for d in draw], [d[1] for d in draw]


def loss_of(params: list[nn.Parameter], targets: list[Tensor]) -> Tensor:
    return torch.stack([(p - t).abs().square().float().sum() for p, t in zip(params, targets)]).sum()


def train(optimizer: Any, params: list[nn.Parameter], targets: list[Tensor], steps: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(params, targets)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_the_table_covers_every_public_optimizer() -> None:
    assert {name for name, _ in VARIANTS} == set(OPTIMIZERS)


@every_variant
def test_loss_falls(name: str, kwargs: dict[str, Any]) -> None:
    params, targets = problem()
    optimizer = build(name, params, **{"lr": 0.05, **kwargs})
    first = float(loss_of(params, targets).detach())
    assert train(optimizer, params, targets, 15) < 0.99 * first


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, *nightly(torch.bfloat16, torch.float64)], ids=str)
def test_save_load_continue_is_bit_identical(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params, targets = problem(dtype)
    optimizer = build(name, params, **kwargs)
    train(optimizer, params, targets, 4)

    for _ in range(2):
        buffer = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "params": params}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        resumed_params = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
        resumed = build(name, resumed_params, **{**kwargs, "lr": 0.5})
        resumed.load_state_dict(saved["optimizer"])
        for p, q in zip(params, resumed_params):
            for key, value in optimizer.state[p].items():
                loaded = resumed.state[q][key]
                assert type(loaded) is type(value)
                if isinstance(value, Tensor):
                    assert loaded.dtype == value.dtype and loaded.data_ptr() != value.data_ptr()
        # A refresh is among them: every third update has one.
        train(optimizer, params, targets, 3)
        train(resumed, resumed_params, targets, 3)
        assert all(torch.equal(p, q) for p, q in zip(params, resumed_params))
        optimizer, params = resumed, resumed_params


@every_variant
def test_deepcopy_and_pickle_continue_alike(name: str, kwargs: dict[str, Any]) -> None:
    params, targets = problem()
    optimizer = build(name, params, **kwargs)
    train(optimizer, params, targets, 2)
    clones = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    # In the order of the groups, which an optimizer may split.
    originals = [p for group in optimizer.param_groups for p in group["params"]]
    goals = [next(t for p, t in zip(params, targets) if p is original) for original in originals]
    before = copy.deepcopy(originals)
    train(optimizer, originals, goals, 3)
    for clone in clones:
        theirs = [p for group in clone.param_groups for p in group["params"]]
        assert all(torch.equal(p, q) for p, q in zip(before, theirs))
        train(clone, theirs, goals, 3)
        assert all(torch.equal(p, q) for p, q in zip(originals, theirs))


@every_optimizer
def test_never_stepped_state_dict_is_empty_and_loads(name: str) -> None:
    optimizer = build(name, problem()[0])
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    build(name, problem()[0]).load_state_dict(saved)


@every_optimizer
def test_load_refuses_a_newer_format_and_other_groups(name: str) -> None:
    optimizer = build(name, problem()[0])
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="format_version: 99"):
        optimizer.load_state_dict({**saved, "format_version": 99})
    with pytest.raises(ValueError, match=r"size of optimizer's group|number of parameter groups"):
        build(name, problem()[0][:2]).load_state_dict(saved)


@every_variant
def test_no_state_pins_a_larger_storage(name: str, kwargs: dict[str, Any]) -> None:
    params, targets = problem()
    optimizer = build(name, params, **kwargs)
    train(optimizer, params, targets, 4)
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert tensors
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@every_variant
def test_the_gradient_is_left_alone(name: str, kwargs: dict[str, Any]) -> None:
    params, targets = problem()
    optimizer = build(name, params, **kwargs)
    loss_of(params, targets).backward()
    grads = [p.grad for p in params]
    copies = [g.clone() for g in grads if g is not None]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads))
    assert all(torch.equal(g, c) for g, c in zip(grads, copies) if g is not None)


@every_optimizer
def test_closure_backpropagates_and_its_loss_is_returned(name: str) -> None:
    params, targets = problem()
    optimizer = build(name, params)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(params, targets)
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@every_variant
def test_maximize_is_descent_on_the_negated_loss(name: str, kwargs: dict[str, Any]) -> None:
    ascend, _ = problem()
    descend, _ = problem()
    up = build(name, ascend, maximize=True, weight_decay=0.1, **kwargs)
    down = build(name, descend, weight_decay=0.1, **kwargs)
    for _ in range(5):
        grads = [torch.randn_like(p) for p in ascend]
        for p, q, g in zip(ascend, descend, grads):
            p.grad, q.grad = -g, g.clone()
        up.step()
        down.step()
    # "full" starts from a diagonal core, whose rounding Adam's division enlarges; 8-bit codes are not symmetric (there
    # is a 1, but no -1), and error feedback adds up the difference; 4-bit codes are rounded up and down by chance; a
    # wrong sign would be 1e-2 a step.
    stored = "int8" if name.endswith("8bit") else kwargs.get("state_dtype")
    tolerance = {"int8": 8e-3, "int4": 3e-2}.get(str(stored), 2e-4)
    for p, q in zip(ascend, descend):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@every_optimizer
def test_missing_late_and_frozen_gradients(name: str) -> None:
    params, targets = problem()
    params[1].requires_grad_(False)
    optimizer = build(name, params)
    before = [p.detach().clone() for p in params]
    params[0].grad = params[0].detach() - targets[0]
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(params, before)]
    assert changed == [True, *[False] * (len(params) - 1)]
    assert set(optimizer.state_dict()["state"]) == {0}
    # A late parameter starts its own count: its first update is what it would have been at the start.
    params[2].grad = params[2].detach() - targets[2]
    optimizer.step()
    lone, _ = problem()
    other = build(name, lone)
    lone[2].grad = lone[2].detach() - targets[2]
    other.step()
    assert torch.equal(params[2], lone[2])


@every_optimizer
def test_a_new_group_joins_a_running_optimizer(name: str) -> None:
    params, targets = problem()
    optimizer = build(name, params[:3])
    train(optimizer, params[:3], targets[:3], 2)
    rank = None if name in WITHOUT_RANK else 2
    optimizer.add_param_group({"params": params[3:], "lr": 3e-3, "rank": rank})
    before = [p.detach().clone() for p in params]
    train(optimizer, params, targets, 2)
    assert all(not torch.equal(p, b) for p, b in zip(params, before))
    assert optimizer.param_groups[1]["rank"] == rank
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})


@every_variant
def test_lr_as_tensor_equals_lr_as_number(name: str, kwargs: dict[str, Any]) -> None:
    a, targets = problem()
    b, _ = problem()
    with_number = build(name, a, **{**kwargs, "lr": 0.02, "weight_decay": 0.01})
    with_tensor = build(name, b, **{**kwargs, "lr": torch.tensor(0.02), "weight_decay": 0.01})
    for optimizer, params in ((with_number, a), (with_tensor, b)):
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(4):
            train(optimizer, params, targets, 1)
            schedule.step()
    for p, q in zip(a, b):
        # Rounding may tip a value into the next 8-bit code; an update is 0.02.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-4)


@every_optimizer
def test_hooks_run(name: str) -> None:
    params, targets = problem()
    optimizer = build(name, params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda _, sd: calls.append(f"load {len(sd['state'])}"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(f"loaded {len(o.state)}"))
    train(optimizer, params, targets, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    n = len(params)
    assert calls == ["pre", "post", f"load {n}", f"loaded {n}"]


@every_variant
def test_complex_parameters(name: str, kwargs: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.randn(s, dtype=torch.complex64)) for s in [(12, 7), (7, 12), (5,), (6, 5, 7)]]
    targets = [torch.randn_like(p) for p in params]
    optimizer = build(name, params, **{"lr": 0.05, **kwargs})
    first = float(loss_of(params, targets).detach())
    assert train(optimizer, params, targets, 15) < 0.97 * first


@every_optimizer
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, r"Invalid lr: -1.0, expected a number in \[0, inf\)"),
        ({"lr": float("nan")}, "Invalid lr: nan"),
        ({"lr": torch.tensor([1.0, 2.0])}, "one element"),
        ({"betas": (1.0, 0.999)}, r"Invalid betas\[0\]: 1.0, expected a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"Invalid betas\[1\]: -0.1"),
        ({"betas": 0.9}, "Invalid betas: 0.9"),
        ({"eps": -1e-8}, "Invalid eps: -1e-08"),
        ({"weight_decay": -0.1}, "Invalid weight_decay: -0.1"),
        ({"rank": 0}, "Invalid rank: 0, expected a positive int or None"),
        ({"rank": 2.5}, "Invalid rank: 2.5"),
        ({"rank": True}, "Invalid rank: True"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap: 0, expected a positive int"),
        ({"backend": "cuda"}, "Invalid backend: 'cuda'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_values_out_of_range_are_named(name: str, kwargs: dict[str, Any], message: str) -> None:
    if not all(accepts(name, key) for key in kwargs.keys() - {"rank"}):
        pytest.skip("no such argument")
    params = problem()[0]
    # Where the constructor takes no rank a group's is still checked.
    if not (name in WITHOUT_RANK and "rank" in kwargs):
        with pytest.raises(ValueError, match=message):
            build(name, params, **kwargs)
    optimizer = build(name, params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:2], **kwargs})
    assert len(optimizer.param_groups) == 1


def test_galore_values_out_of_range_are_named() -> None:
    params = problem()[0]
    with pytest.raises(ValueError, match="Invalid scale: -1"):
        build("GaLoreAdamW", params, scale=-1)
    with pytest.raises(ValueError, match="Invalid proj_type: 'both', expected one of 'std', 'reverse_std'"):
        build("GaLoreAdamW", params, proj_type="both")
    with pytest.raises(ValueError, match="Invalid refresh: 'qr', expected one of 'power', 'randomized', 'svd'"):
        build("GaLoreAdamW", params, refresh="qr")


@every_optimizer
def test_triton_without_a_device_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    params, targets = problem()
    with pytest.raises(RuntimeError, match="backend='triton'"):
        train(build(name, params, backend="triton"), params, targets, 1)


@every_optimizer
def test_sparse_gradients_are_refused(name: str) -> None:
    embedding = nn.Embedding(10, 8, sparse=True)
    optimizer = build(name, embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients only"):
        optimizer.step()
