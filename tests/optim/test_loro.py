from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from lowrank_optim import LOROAdamW, factor_groups
from lowrank_optim.nn import LORO, CoLA, LowRank, MomentumReset, convert
from lowrank_optim.ops.factors import retracted_step
from tests.nn.parameterizations import Block, block, train


def converted(rank: int = 4) -> Block:
    model = block()
    convert(model, LORO(rank=rank))
    return model


def test_groups_hold_one_layer_each_and_the_rest() -> None:
    model = converted()
    groups = factor_groups(model, update_proj_gap=7)
    assert [group["rank"] for group in groups] == [4, 4, 4, 4, None]
    assert groups[0]["param_names"] == ["attn.q_proj.B", "attn.q_proj.A"]
    assert groups[0]["update_proj_gap"] == 7
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    # The constructor makes the same of named parameters.
    optimizer = LOROAdamW(model.named_parameters())
    assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in groups]
    methods = {row.name: row.method for row in optimizer.explain()}
    assert methods["mlp.up_proj.A"] == "rank 4" and methods["mlp.up_proj.bias"] == "full-rank"


def test_only_where_no_factors_are_found_a_warning_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOROAdamW(factor_groups(converted()))
    with pytest.warns(UserWarning, match="no factors among the parameters"):
        LOROAdamW([nn.Parameter(torch.ones(8, 4))])


def test_parameters_that_are_no_factors_have_no_rank() -> None:
    for shapes in ([(8, 4), (5, 9)], [(8, 4), (4,)], [(8, 4)], [(8, 4), (4, 9), (4, 9)]):
        with pytest.raises(ValueError, match="Invalid rank: 4, expected None"):
            LOROAdamW([{"params": [nn.Parameter(torch.ones(shape)) for shape in shapes], "rank": 4}])
    LOROAdamW([{"params": [nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(4, 9))], "rank": 4}])


def test_adapters_beside_a_weight_are_no_layers() -> None:
    weights = {name: nn.Parameter(torch.ones(4, 4)) for name in ("up.B", "up.A", "down.lora_B", "down.lora_A")}
    assert [group["param_names"] for group in factor_groups(weights.items())] == [
        ["up.B", "up.A"],
        ["down.lora_B", "down.lora_A"],
    ]
    with pytest.raises(ValueError, match="no factors B and A"):
        factor_groups([(name, p) for name, p in weights.items() if "lora" in name])


def test_an_ordinary_step_is_adam_scaled_by_the_rank() -> None:
    model = converted()
    reference = copy.deepcopy(model)
    optimizer = LOROAdamW(factor_groups(model), lr=1e-2, eps=0.0, update_proj_gap=100)
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=0.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 0, 1)
    train(reference, adam, 0, 1)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        scale = 4 / 12 if name.endswith((".A", ".B")) else 1.0
        torch.testing.assert_close(p - before[name], scale * (q - before[name]), rtol=1e-4, atol=1e-6)


def test_the_step_on_the_manifold_uses_the_directions_of_adam() -> None:
    model = converted()
    optimizer = LOROAdamW(factor_groups(model), lr=1e-2, update_proj_gap=3)
    train(model, optimizer, 0, 2)
    layer = model.mlp["up_proj"]
    b, a = layer.B.detach().clone(), layer.A.detach().clone()
    moments = [{k: v.clone() for k, v in optimizer.state[p].items() if k.startswith("exp")} for p in (layer.B, layer.A)]
    train(model, optimizer, 2, 1)
    directions = []
    for p, state in zip((layer.B, layer.A), moments, strict=True):
        first = 0.9 * state["exp_avg"] + 0.1 * p.grad
        second = 0.999 * state["exp_avg_sq"] + 0.001 * p.grad**2
        directions.append(first / (second.sqrt() + 1e-6) * (1 - 0.999**3) ** 0.5 / (1 - 0.9**3))
    moved = retracted_step(b, a, directions[0], directions[1], 1e-2)
    assert moved is not None
    torch.testing.assert_close(layer.B @ layer.A, moved[0] @ moved[1], rtol=1e-4, atol=1e-5)
    state = optimizer.state[layer.B]
    assert state["step"] == 0 and state["updates"] == 3 and not state["exp_avg"].any() and "grad" not in state
    # Parameters without factors go on, and have no count of their own.
    ordinary = optimizer.state[model.lm_head.weight]
    assert ordinary["step"] == 3 and "updates" not in ordinary


def test_training_falls_and_continues_to_the_last_bit() -> None:
    model = converted()
    optimizer = LOROAdamW(factor_groups(model), lr=2e-2, update_proj_gap=10)
    losses = train(model, optimizer, 0, 83)
    assert losses[-1] < 0.6 * losses[0]
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = train(model, optimizer, 83, 12)
    other = converted()
    resumed = LOROAdamW(factor_groups(other), lr=2e-2, update_proj_gap=10)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 83, 12) == expected


def test_the_published_restarts_train() -> None:
    model = converted()
    optimizer = LOROAdamW(factor_groups(model), lr=2e-2, update_proj_gap=10)
    callback = MomentumReset(model, optimizer, every=10, ramp=5)
    losses = []
    for step in range(80):
        losses += train(model, optimizer, step, 1)
        callback.after_step(step + 1)
    assert losses[-1] < 0.6 * losses[0]


def test_decay_and_ascent_of_a_step_on_the_manifold() -> None:
    results = {}
    for name, kwargs in {"plain": {}, "decay": {"weight_decay": 0.5}, "ascent": {"maximize": True}}.items():
        model = converted()
        layer = model.mlp["up_proj"]
        start = (layer.B @ layer.A).detach()
        train(model, LOROAdamW(factor_groups(model), lr=1e-2, update_proj_gap=1, **kwargs), 0, 1)
        results[name] = (layer.B @ layer.A).detach() - start
        results["start"] = start
    shrunk = (results["start"] + results["plain"]) * (1 - 1e-2 * 0.5) ** 2
    torch.testing.assert_close(results["start"] + results["decay"], shrunk, rtol=1e-4, atol=1e-6)
    assert torch.nn.functional.cosine_similarity(results["plain"].flatten(), results["ascent"].flatten(), dim=0) < -0.9


def test_a_factor_without_full_rank_makes_an_ordinary_step() -> None:
    model = converted()
    layer = model.mlp["up_proj"]
    with torch.no_grad():
        layer.B.zero_()
    optimizer = LOROAdamW(factor_groups(model), lr=1e-2, update_proj_gap=1)
    with pytest.warns(RuntimeWarning, match="full rank"):
        train(model, optimizer, 0, 1)
    assert layer.B.any() and layer.B.isfinite().all()


def test_a_gradient_that_is_not_finite_is_skipped_by_both_factors() -> None:
    model = converted()
    optimizer = LOROAdamW(factor_groups(model), lr=1e-2, update_proj_gap=1)
    layer = model.mlp["up_proj"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    layer.A.grad[0, 0] = float("nan")
    before = layer.B.detach().clone()
    with pytest.warns(RuntimeWarning, match="non-finite"):
        optimizer.step()
    assert torch.equal(layer.B, before) and layer.A.isfinite().all()


def test_a_step_on_the_manifold_takes_two_gradients_of_one_update() -> None:
    layer = nn.Module()
    layer.B, layer.A = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))

    def made() -> LOROAdamW:
        return LOROAdamW(factor_groups(layer), lr=1e-2, update_proj_gap=2)

    def step(optimizer: LOROAdamW, *params: nn.Parameter) -> bool:
        """Whether the last update moved B; a step on the manifold zeroes the counts of both."""
        for p in (layer.B, layer.A):
            p.grad = torch.randn_like(p) if any(p is q for q in params) else None
        before = layer.B.detach().clone()
        optimizer.step()
        return not torch.equal(layer.B, before)

    optimizer = made()
    assert step(optimizer, layer.B, layer.A) and step(optimizer, layer.B, layer.A)
    assert optimizer.state[layer.A]["step"] == optimizer.state[layer.B]["step"] == 0
    # The gradient of A is that of its fourth update, that of B of its second.
    optimizer = made()
    for _ in range(4):
        step(optimizer, layer.A)
    assert step(optimizer, layer.B) and not step(optimizer, layer.B)
    # What waited was not saved.
    optimizer = made()
    step(optimizer, layer.B, layer.A)
    step(optimizer, layer.A)
    resumed = made()
    resumed.load_state_dict(optimizer.state_dict())
    assert not step(resumed, layer.B)
    assert step(resumed, layer.B, layer.A) and step(resumed, layer.B, layer.A)


def test_what_has_no_factors_is_refused() -> None:
    model = block()
    with pytest.raises(ValueError, match="no factors"):
        factor_groups(model)
    with pytest.warns(UserWarning, match="no factors"):
        LOROAdamW(model.parameters())
    convert(model, CoLA(rank=4))
    with pytest.raises(ValueError, match=r"attn\.q_proj.*activation"):
        factor_groups(model)
    other = block()
    convert(other, LowRank(rank=4))
    with pytest.raises(ValueError, match="Invalid rank: 3"):
        LOROAdamW([{"params": [other.mlp["up_proj"].B, other.mlp["up_proj"].A], "rank": 3}])
    with pytest.raises(ValueError, match="Invalid scale: -1"):
        LOROAdamW(factor_groups(other), scale=-1)
