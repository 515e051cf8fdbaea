from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.nn import (
    CoLA,
    LoRA,
    LowRank,
    MergeAndRestart,
    MomentumReset,
    ReLoRA,
    SLTrain,
    WeightRefactorization,
    convert,
)
from lowrank_optim.nn.restarts import Restart, reset_moments_
from tests.nn.parameterizations import Block, block, loss_of, train
from tests.optimizers import build


def model_and_optimizer(options: Any = None, **kwargs: Any) -> tuple[Block, torch.optim.AdamW]:
    model = block()
    convert(model, options or LowRank(rank=4))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **kwargs})


def run(model: nn.Module, optimizer: Any, callbacks: list[Restart], first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        losses += train(model, optimizer, step, 1)
        for callback in callbacks:
            callback.after_step(step + 1)
    return losses


def test_restarts_count_updates_and_wait_for_the_first() -> None:
    model, _ = model_and_optimizer()
    callback = WeightRefactorization(model, every=4, first=8)
    assert [step for step in range(18) if callback.after_step(step)] == [8, 12, 16]


def test_refactorization_keeps_the_function_and_balances_the_factors() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 0, 10)
    ids = torch.arange(11)[None]
    before, old = model(ids), model.mlp["up_proj"].A.clone()
    assert WeightRefactorization(model, every=10).after_step(10)
    layer = model.mlp["up_proj"]
    assert (model(ids) - before).abs().max() < 1e-5
    assert not torch.allclose(layer.A, old)
    torch.testing.assert_close(layer.B.T @ layer.B, layer.A @ layer.A.T, rtol=0, atol=1e-5)


def test_refactorization_leaves_sparse_values_and_their_support() -> None:
    model, optimizer = model_and_optimizer(SLTrain(rank=4, sparsity=0.1, alpha=8))
    train(model, optimizer, 0, 10)
    layer = model.mlp["up_proj"]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = layer.dense_weight()
    WeightRefactorization(model, every=10).after_step(10)
    after = layer.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"A", "B"}
    assert (layer.dense_weight() - weight).norm() < 1e-5 * weight.norm()
    # The scale stays outside of the split.
    torch.testing.assert_close(layer.B.T @ layer.B, layer.A @ layer.A.T, rtol=0, atol=1e-5)


def test_refactorization_in_bf16_rounds_once() -> None:
    layer = LowRank(rank=8).build(96, 64, dtype=torch.bfloat16)
    before = layer.dense_weight().double()
    exact = layer.B.double() @ layer.A.double()
    WeightRefactorization(nn.Sequential(layer), every=1).after_step(1)
    change = layer.B.double() @ layer.A.double() - exact
    assert 0 < change.norm() < 3e-3 * before.norm()


def test_refactorization_of_untouched_lora_leaves_it_alive() -> None:
    model, _ = model_and_optimizer(LoRA(rank=4))
    WeightRefactorization(model, every=1).after_step(1)
    assert all(model.get_submodule(name).A.any() for name in ("attn.q_proj", "mlp.up_proj"))


def test_refactorization_refuses_an_activation() -> None:
    model, optimizer = model_and_optimizer(CoLA(rank=4))
    with pytest.raises(ValueError, match=r"attn\.q_proj.*activation.*MomentumReset"):
        WeightRefactorization(model)
    MomentumReset(model, optimizer)


@pytest.mark.parametrize("scope", ["all", "factors"])
def test_a_reset_zeroes_moments_and_counts_in_place(scope: str) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 0, 3)
    before = {p: dict(state) for p, state in optimizer.state.items()}
    assert MomentumReset(model, optimizer, every=3, ramp=2, scope=scope).after_step(3)
    factors = {p for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
    assert len(factors) == 8
    for p, state in optimizer.state.items():
        touched = scope == "all" or p in factors
        for key, value in state.items():
            assert value is before[p][key]
            assert bool(value.any()) is not touched, key


def test_the_first_update_after_a_reset_is_the_lowered_rate_times_the_sign() -> None:
    model, optimizer = model_and_optimizer(eps=1e-12, weight_decay=0.0)
    callback = MomentumReset(model, optimizer, every=5, ramp=3)
    run(model, optimizer, [callback], 0, 5)
    b = model.mlp["up_proj"].B
    before = b.clone()
    train(model, optimizer, 5, 1)
    torch.testing.assert_close(b - before, -1e-2 * 0.001 * b.grad.sign(), rtol=1e-2, atol=1e-7)


def test_the_ramp_scales_the_schedule_without_touching_it() -> None:
    model, optimizer = model_and_optimizer()
    # A schedule that computes its next value from the last one: a rate that stays lowered would corrupt it.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    callback = MomentumReset(model, optimizer, every=6, first=6, ramp=4)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    outside = []
    for step in range(14):
        train(model, optimizer, step, 1)
        schedule.step()
        callback.after_step(step + 1)
        outside.append(optimizer.param_groups[0]["lr"])
    base = [1e-2 * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(15)]
    assert outside == pytest.approx(base[1:])
    ramp = [1.0] * 6 + [0.001, 0.334, 0.667, 1.0, 1.0, 1.0] + [0.001, 0.334]
    assert used == pytest.approx([lr * factor for lr, factor in zip(base, ramp)], rel=1e-6)


def test_the_ramp_lowers_tensor_rates_in_place() -> None:
    model, optimizer = model_and_optimizer(lr=torch.tensor(1e-2))
    lr = optimizer.param_groups[0]["lr"]
    callback = MomentumReset(model, optimizer, every=2, ramp=2)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"].item()))
    run(model, optimizer, [callback], 0, 3)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(1e-2)
    assert seen == pytest.approx([1e-2, 1e-2, 1e-5])


def test_the_ramp_lowers_updates_in_the_backward_pass() -> None:
    model, _ = model_and_optimizer()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=None)
    callback = MomentumReset(model, optimizer, every=3, ramp=3)
    twin = copy.deepcopy(model)
    by_step = lowrank_optim.GaLoreAdamW(twin.named_parameters(), lr=1e-2, rank=None)
    expected = run(twin, by_step, [MomentumReset(twin, by_step, every=3, ramp=3)], 0, 5)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.register_post_accumulate_grad_hook(lambda p, group=group: optimizer.step_param(p, group))
    losses = []
    for step in range(5):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        with callback.ramped():
            loss.backward()
        assert optimizer.param_groups[0]["lr"] == 1e-2
        callback.after_step(step + 1)
        losses.append(loss.item())
    assert losses == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_restarts_continue_from_their_state() -> None:
    def start() -> tuple[Block, torch.optim.AdamW, list[Restart]]:
        model, optimizer = model_and_optimizer(ReLoRA(rank=4))
        return model, optimizer, [MergeAndRestart(model, optimizer, every=5, ramp=4, seed=3)]

    model, optimizer, callbacks = start()
    run(model, optimizer, callbacks, 0, 7)
    saved = [model.state_dict(), optimizer.state_dict(), [c.state_dict() for c in callbacks]]
    saved = torch.load(_through_a_file(saved), weights_only=True)
    expected = run(model, optimizer, callbacks, 7, 10)
    torch.rand(5)
    model, optimizer, callbacks = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for callback, state in zip(callbacks, saved[2], strict=True):
        callback.load_state_dict(state)
    assert run(model, optimizer, callbacks, 7, 10) == expected


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_a_merge_keeps_the_function_and_resets_only_the_factors() -> None:
    model, optimizer = model_and_optimizer(ReLoRA(rank=4))
    train(model, optimizer, 0, 6)
    ids = torch.arange(11)[None]
    before = model(ids)
    assert MergeAndRestart(model, optimizer, every=6, ramp=3).after_step(6)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-5)
    layer = model.attn["q_proj"]
    assert not layer.B.any() and layer.A.any()
    assert optimizer.state[layer.A]["step"] == 0 and not optimizer.state[layer.A]["exp_avg_sq"].any()
    assert optimizer.state[model.lm_head.weight]["step"] == 6


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_pruning_zeroes_its_share_of_both_moments_together(by: str) -> None:
    model, optimizer = model_and_optimizer(ReLoRA(rank=4))
    train(model, optimizer, 0, 4)
    layer = model.mlp["up_proj"]
    old = optimizer.state[layer.A]["exp_avg"].abs().clone()
    MergeAndRestart(model, optimizer, every=4, ramp=0, prune=0.75, by=by).after_step(4)
    state = optimizer.state[layer.A]
    gone = state["exp_avg"] == 0
    assert int(gone.sum()) == round(0.75 * gone.numel())
    assert torch.equal(gone, state["exp_avg_sq"] == 0)
    assert state["step"] == 4
    if by == "magnitude":
        assert old[gone].max() <= old[~gone].min()


def test_training_goes_on_through_restarts() -> None:
    model, optimizer = model_and_optimizer()
    callbacks = [WeightRefactorization(model, every=20), MomentumReset(model, optimizer, every=20, ramp=5)]
    losses = run(model, optimizer, callbacks, 0, 120)
    assert callbacks[0].restarts == callbacks[1].restarts == 6
    assert losses[-1] < 0.5 * losses[0]
    # The loss does not jump at a restart.
    assert all(losses[k] < 1.3 * losses[k - 1] for k in range(20, 120, 20))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.NAdam])
def test_other_optimizers_can_be_reset(cls: Any) -> None:
    model, _ = model_and_optimizer()
    optimizer = cls(model.parameters(), lr=1e-2, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    train(model, optimizer, 0, 2)
    MomentumReset(model, optimizer, every=2, ramp=2).after_step(2)
    for state in optimizer.state.values():
        left = {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.any()}
        assert left <= {"mu_product"}


def test_ours_can_be_reset() -> None:
    model, _ = model_and_optimizer()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=2, update_proj_gap=3)
    train(model, optimizer, 0, 4)
    MomentumReset(model, optimizer, every=4, ramp=2).after_step(4)
    for state in optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    train(model, optimizer, 4, 2)


@pytest.mark.parametrize("name", ["Muon", "Trion", "RACS", "SinkGD", "LoRAPre"])
def test_a_reset_takes_every_optimizer_of_the_package(name: str) -> None:
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = build(name, [p], **({"rank": 2} if name in ("Trion", "LoRAPre") else {}))
    for _ in range(2):
        p.grad = torch.randn(6, 4)
        optimizer.step()
        reset_moments_(optimizer, [p])
        state = optimizer.state[p]
        assert state["step"] == 0
        assert not any(state[key].any() for key in ("momentum", "row_scale", "column_scale") if key in state)
    optimizer.step()
    # From two factors of zeros no moment would ever move again.
    assert name != "LoRAPre" or (state["exp_avg.left"] @ state["exp_avg.right"].mT).any()


def test_8_bit_moments_read_as_zero_after_a_reset() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.randn(64, 128))
    optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1e-2, min_8bit_size=16)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = optimizer.state[p]["qmap1"].clone()
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    model, _ = model_and_optimizer()
    MomentumReset(model, optimizer, every=1, ramp=0).after_step(1)
    state = optimizer.state[p]
    assert not state["absmax1"].any() and not state["absmax2"].any() and state["step"] == 0
    assert torch.equal(state["qmap1"], before)


def test_an_optimizer_without_known_moments_is_an_error() -> None:
    model, _ = model_and_optimizer()
    optimizer = torch.optim.Rprop(model.parameters())
    train(model, optimizer, 0, 1)
    with pytest.raises(ValueError, match=r"Rprop keeps .*prev.*moment"):
        MomentumReset(model, optimizer, every=1, ramp=0).after_step(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "Invalid every: 0"),
        ({"ramp": 11, "every": 10}, r"Invalid ramp: 11, expected a number in \[0, 10\]"),
        ({"first": -1}, "Invalid first: -1"),
        ({"scope": "sparse"}, "Invalid scope: 'sparse'"),
    ],
)
def test_options_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match=message):
        MomentumReset(model, optimizer, **arguments)


def test_a_model_without_factors_is_an_error() -> None:
    optimizer = torch.optim.AdamW(block().parameters())
    for call in (
        lambda: WeightRefactorization(block()),
        lambda: MomentumReset(block(), optimizer, scope="factors"),
        lambda: MergeAndRestart(block(), optimizer),
    ):
        with pytest.raises(ValueError, match="holds no"):
            call()
    with pytest.raises(ValueError, match="Invalid prune"):
        MergeAndRestart(block(), optimizer, prune=1.5)
