"""SSTAdamW over layers of SST: the clock, the draws, the decompositions, and their resumption."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, spectral_groups
from lowrank_optim.memory.estimate import init_state_
from lowrank_optim.nn import SST, SSTLinear, convert
from lowrank_optim.ops.rounding import join_24_bits
from lowrank_optim.ops.triplets import Triplets, compose
from lowrank_optim.pretrain.optimizers import build_optimizer
from tests.conformance import nightly
from tests.nn.sst_training import GAP, RANK, ROUND, Toy, loss_of, make, save, train

ROOT = Path(__file__).resolve().parents[2]


def layers(model: nn.Module) -> list[SSTLinear]:
    return [module for module in model.modules() if isinstance(module, SSTLinear)]


def snapshot(model: nn.Module) -> list[Triplets]:
    return [Triplets(*(p.detach().clone() for p in layer.parts)) for layer in layers(model)]


def columns(parts: Triplets) -> Tensor:
    return torch.cat([parts.v, parts.v_frozen], dim=1).detach()


def test_within_an_iteration_vectors_have_unit_length_and_the_frozen_stay() -> None:
    model, optimizer = make()
    start = snapshot(model)
    # No sample is drawn after the last of these.
    for step in range(GAP - 1):
        train(model, optimizer, step, step + 1)
        for layer, old in zip(layers(model), start):
            for vectors in (layer.u, layer.v):
                torch.testing.assert_close(vectors.norm(dim=0), torch.ones(RANK), rtol=0, atol=1e-6)
            assert torch.equal(layer.u_frozen, old.u_frozen) and torch.equal(layer.v_frozen, old.v_frozen)
            assert (layer.s >= 0).all()
    for layer, old in zip(layers(model), start):
        assert not torch.equal(layer.u, old.u) and not torch.equal(layer.v, old.v)
        # All singular values train, those of frozen vectors too.
        assert (layer.s != old.s).all()


def test_singular_values_stop_at_zero() -> None:
    layer = SST(rank=2).build(6, 5, bias=False)
    optimizer = SSTAdamW(spectral_groups(layer), lr=10.0, warmup=0)
    layer.s.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(layer.s, torch.zeros(5))
    assert optimizer.state[layer.s]["step"] == 1


def test_the_clock_draws_every_gap_and_decomposes_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_optim.optim import sst

    model, optimizer = make()
    events: list[tuple[int, str]] = []
    step = 0
    for name in ("activate_", "decompose_"):
        inner = getattr(sst, name)

        def spy(parts: Triplets, *args: Any, inner: Any = inner, name: str = name) -> Any:
            before = compose(parts)
            result = inner(parts, *args)
            # Neither changes the weight.
            torch.testing.assert_close(compose(parts), before, rtol=0, atol=2e-6)
            events.append((step, name))
            return result

        monkeypatch.setattr(sst, name, spy)
    for step in range(1, 2 * ROUND * GAP + 1):
        train(model, optimizer, step, step + 1)
    number = len(layers(model))
    draws, rounds = range(GAP, 2 * ROUND * GAP + 1, GAP), (ROUND * GAP, 2 * ROUND * GAP)
    assert [e for e in events if e[1] == "activate_"] == [(s, "activate_") for s in draws for _ in range(number)]
    assert [e for e in events if e[1] == "decompose_"] == [(s, "decompose_") for s in rounds for _ in range(number)]


def test_a_draw_zeroes_moments_of_vectors_and_moves_those_of_values() -> None:
    model, optimizer = make()
    train(model, optimizer, 0, GAP - 1)
    layer = layers(model)[0]
    twin = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    loss_of(model, GAP - 1).backward()
    optimizer.step()
    old = columns(layers(twin[0])[0].parts)
    new = columns(layer.parts)
    for p in (layer.u, layer.v):
        state = optimizer.state[p]
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    state, before = optimizer.state[layer.s], twin[1].state[layers(twin[0])[0].s]
    assert state["step"] == GAP
    # Vectors that did not train in this step tell which triplet went where; the moment of its value went along.
    assert layer.s.grad is not None
    expected = before["exp_avg"].lerp(layer.s.grad, 0.1)
    same = (old[:, None, :] == new[:, :, None]).all(0)
    moved = [(int(i), int(j)) for i, j in same.nonzero()]
    assert sum(i != j for i, j in moved) >= 1
    for i, j in moved:
        torch.testing.assert_close(state["exp_avg"][i], expected[j], rtol=1e-6, atol=1e-9)


def test_a_decomposition_zeroes_the_moments_of_values() -> None:
    model, optimizer = make()
    train(model, optimizer, 0, ROUND * GAP)
    for layer in layers(model):
        state = optimizer.state[layer.s]
        assert state["step"] == 0 and not state["exp_avg"].any()
        v = columns(layer.parts)
        torch.testing.assert_close(v.mT @ v, torch.eye(v.shape[1]), rtol=0, atol=1e-5)
    ordinary = optimizer.state[model.head.weight]
    assert ordinary["step"] == ROUND * GAP and ordinary["exp_avg"].any()


def test_the_ramp_follows_each_zeroing() -> None:
    layer = SST(rank=2).build(6, 5, bias=False)
    optimizer = SSTAdamW(
        spectral_groups(layer), lr=1e-3, betas=(0.0, 0.0), eps=0.0, update_proj_gap=6, samples_per_round=3, warmup=4
    )
    with torch.no_grad():
        layer.s.fill_(1.0)
    moves = []
    for _ in range(6 * 3 + 4):
        for p in (layer.u, layer.s, layer.v):
            p.grad = torch.ones_like(p)
        before = float(layer.s.detach().sum())
        optimizer.step()
        moves.append((before - float(layer.s.detach().sum())) / 5e-3)
    # Values ramp after a decomposition only; betas of 0 make every Adam step of length lr.
    ramp = [0.001 + 0.999 * j / 3 for j in range(3)]
    expected = [*ramp, *[1.0] * 15, *ramp, 1.0]
    # The decomposition itself changes the sum of s; its step is not comparable.
    del moves[17], expected[17]
    assert moves == pytest.approx(expected, abs=2e-3)
    # Vectors ramp after every draw.
    layer = SST(rank=2).build(6, 5, bias=False, dtype=torch.float64)
    optimizer = SSTAdamW(spectral_groups(layer), lr=1e-4, betas=(0.0, 0.0), eps=0.0, update_proj_gap=4, warmup=3)
    turns = []
    for _ in range(7):
        for p in (layer.u, layer.s, layer.v):
            p.grad = torch.randn(p.shape, dtype=p.dtype)
        old = layer.u.detach().clone()
        optimizer.step()
        turns.append(float((layer.u.detach() - old)[:, 0].norm()))
    assert turns[5] / turns[4] > 100 and turns[1] / turns[0] > 100


def test_a_full_sample_trains_every_vector_as_autograd_would() -> None:
    layer = SST(rank=5, std=0.3, enhanced=False).build(6, 5, bias=False, dtype=torch.float64)
    assert layer.u_frozen.shape == (5, 0) and layer.v_frozen.shape == (6, 0)
    u, s, v = (p.detach().clone().requires_grad_() for p in (layer.u, layer.s, layer.v))
    ours = SSTAdamW(spectral_groups(layer), lr=0.01, update_proj_gap=1000, warmup=0)
    plain = SSTAdamW([("factor", u), ("values", s), ("other", v)], lr=0.01)
    for _ in range(30):
        x = torch.randn(8, 6, dtype=torch.float64)
        for optimizer, y in ((ours, layer(x)), (plain, ((x @ v) * s) @ u.mT)):
            optimizer.zero_grad()
            (y - x[:, :5]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            u.div_(u.norm(dim=0))
            v.div_(v.norm(dim=0))
            s.clamp_(min=0)
    for p, q in zip((layer.u, layer.s, layer.v), (u, s, v)):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_it_learns_beyond_its_rank() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(16, 16) / 4
    layer = SST(rank=4, std=0.25).build(16, 16, bias=False)
    optimizer = SSTAdamW(spectral_groups(layer), lr=0.02, update_proj_gap=20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        (layer(x) - x @ teacher.mT).square().mean().backward()
        optimizer.step()
        schedule.step()
    tail = torch.linalg.svdvals(teacher)[4:].norm()
    # No matrix of rank 4 comes nearer than the tail of the spectrum.
    assert float((layer.dense_weight() - teacher).norm()) < 0.2 * float(tail)


@pytest.mark.slow
def test_resumed_in_a_new_process_is_bit_identical(tmp_path: Path) -> None:
    # Every run passes draws and a decomposition after the file was written.
    last = 2 * GAP * ROUND + 2
    runs = {}
    for at, dtype in ((3, torch.float32), (GAP, torch.bfloat16), (GAP * ROUND - 1, torch.float32)):
        path = str(tmp_path / f"{at}.pt")
        model, optimizer = make(dtype=dtype)
        train(model, optimizer, 0, at)
        save(path, model, optimizer, at)
        train(model, optimizer, at, last)
        runs[path] = (model, optimizer)
    # One process for all, because importing torch takes longer than everything else.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "tests.nn.sst_training", str(last), *runs]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    for path, (model, optimizer) in runs.items():
        resumed = torch.load(f"{path}.end", weights_only=True)
        assert resumed["model"].keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(resumed["model"][key], value), key
        for key, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                other = resumed["optimizer"]["state"][key][name]
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


@pytest.mark.parametrize(
    "options",
    [
        {"weight_rounding": "stochastic", "state_dtype": "bfloat16"},
        {"weight_rounding": "compensated", "state_dtype": "int8"},
        *nightly({"state_dtype": "int8"}, {"state_dtype": "bfloat16"}, {"weight_rounding": "stochastic"}),
    ],
    ids=str,
)
def test_stored_in_fewer_bits_it_learns_and_resumes(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the moments of these small layers are quantized too.
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 1)
    model, optimizer = make(dtype=torch.bfloat16, **options)
    losses = train(model, optimizer, 0, GAP - 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses += train(model, optimizer, GAP - 1, 2 * ROUND * GAP + 3)
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5
    other, resumed = make(seed=5, dtype=torch.bfloat16, **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, GAP - 1, 2 * ROUND * GAP + 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


def test_compensated_weights_keep_24_bits_over_draws() -> None:
    model, optimizer = make(dtype=torch.bfloat16, weight_rounding="compensated")
    for step in range(2 * GAP):
        train(model, optimizer, step, step + 1)
        for layer in layers(model):
            for p in (layer.u, layer.v):
                lengths = join_24_bits(p.detach(), optimizer.state[p]["weight_correction"]).norm(dim=0)
                # A frozen vector that comes in has the 8 bits of bfloat16 until its first update.
                atol = 1e-4 if (step + 1) % GAP else 1e-2
                torch.testing.assert_close(lengths, torch.ones(RANK), rtol=0, atol=atol)


def test_the_seed_decides_the_draws() -> None:
    runs = []
    for seed in (0, 0, 1):
        model, optimizer = make()
        for group in optimizer.param_groups:
            group["seed"] = seed
        train(model, optimizer, 0, GAP)
        runs.append(torch.cat([layer.s.detach() for layer in layers(model)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    # Layers of one shape draw apart.
    model, optimizer = make()
    same = [layer for layer in layers(model) if layer.in_features == 12]
    with torch.no_grad():
        for p, q in zip(same[0].parts, same[1].parts):
            q.copy_(p)
    for _ in range(GAP):
        for layer in same:
            for p in (layer.u, layer.s, layer.v):
                p.grad = torch.zeros_like(p)
        optimizer.step()
    assert not torch.equal(same[0].s, same[1].s)


def test_updates_in_backward_equal_a_step_at_the_end() -> None:
    a, by_step = make()
    b, in_backward = make()
    for group in in_backward.param_groups:
        for p in group["params"]:
            if p.requires_grad:

                def hook(p: Tensor, group: Any = group) -> None:
                    in_backward.step_param(p, group)
                    p.grad = None

                p.register_post_accumulate_grad_hook(hook)
    for step in range(ROUND * GAP + 3):
        train(a, by_step, step, step + 1)
        loss_of(b, step).backward()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_non_finite_gradient_of_one_part_does_not_stop_the_clock() -> None:
    model, optimizer = make()
    layer = layers(model)[0]
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        for step in range(GAP):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step == 2:
                layer.u.grad.fill_(float("nan"))
            optimizer.step()
    assert [optimizer.state[p]["updates"] for p in (layer.u, layer.s, layer.v)] == [GAP] * 3
    assert [optimizer.state[p]["step"] for p in (layer.u, layer.v)] == [0, 0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_deepcopy_and_pickle_continue_alike() -> None:
    model, optimizer = make()
    train(model, optimizer, 0, 2)
    for clone, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        ours, mine = copy.deepcopy((model, optimizer))
        train(clone, other, 2, ROUND * GAP + 2)
        train(ours, mine, 2, ROUND * GAP + 2)
        assert all(torch.equal(p, q) for p, q in zip(clone.parameters(), ours.parameters()))


@pytest.mark.parametrize("frozen", ["u", "s", "v"])
def test_a_part_that_is_frozen_is_sampled_and_decomposed_all_the_same(frozen: str) -> None:
    layer = SST(rank=2).build(6, 5, bias=False)
    optimizer = SSTAdamW(spectral_groups(layer), lr=1e-3, update_proj_gap=2, samples_per_round=2)
    getattr(layer, frozen).requires_grad_(False)
    trained = [p for p in (layer.u, layer.s, layer.v) if p.requires_grad]
    for step in range(1, 6):
        before = getattr(layer, frozen).detach().clone()
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert (step % 2 == 0) is not torch.equal(getattr(layer, frozen), before)
    assert getattr(layer, frozen) not in optimizer.state
    assert all(optimizer.state[p]["updates"] == 5 and p.isfinite().all() for p in trained)


def test_only_what_trains_has_state() -> None:
    model, optimizer = make()
    train(model, optimizer, 0, 1)
    methods = {row.name: (row.method, row.reason) for row in optimizer.explain()}
    assert methods["head.weight"] == ("full-rank", "its group has no rank")
    for layer in layers(model):
        assert layer.u_frozen not in optimizer.state and layer.v_frozen not in optimizer.state
        m, n, q = layer.out_features, layer.in_features, layer.s.numel()
        tensors = [t for p in layer.parts for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        assert sum(t.numel() for t in tensors) == 2 * (RANK * (m + n) + q)
    with torch.device("meta"):
        empty = Toy()
    convert(empty, SST(rank=RANK))
    planned = SSTAdamW(spectral_groups(empty))
    init_state_(planned)
    assert {k: v["exp_avg"].shape for k, v in planned.state_dict()["state"].items()} == {
        k: v["exp_avg"].shape for k, v in optimizer.state_dict()["state"].items()
    }


def test_groups_from_a_model_from_names_and_by_the_factory() -> None:
    model, by_model = make()
    by_names = SSTAdamW(model.named_parameters())
    by_factory = build_optimizer("SSTAdamW", model, lr=0.1, weight_decay=0.01, args={"update_proj_gap": 5})
    for optimizer in (by_names, by_factory):
        assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in by_model.param_groups]
    assert [g["rank"] for g in by_factory.param_groups] == [RANK] * 4 + [None]
    assert [g["weight_decay"] for g in by_factory.param_groups] == [0.0] * 4 + [0.01]
    assert by_model.param_groups[0]["param_names"] == [
        f"blocks.0.attn.{part}" for part in ("u", "s", "v", "u_frozen", "v_frozen")
    ]
    methods = [(row.name.rpartition(".")[2], row.method) for row in by_model.explain()[:6]]
    assert methods == [
        ("u", "rank 3"), ("s", "full-rank"), ("v", "rank 3"), ("u_frozen", "frozen"), ("v_frozen", "frozen"),
        ("u", "rank 3"),
    ]  # fmt: skip


def test_clear_errors() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match=r"no SST layer; lowrank_optim\.nn\.convert"):
        spectral_groups(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="no SST layer"):
        build_optimizer("SSTAdamW", Toy())
    with pytest.raises(ValueError, match="'targets'"):
        build_optimizer("SSTAdamW", model, args={"targets": "mlp"})
    with pytest.warns(UserWarning, match="no SST layer among the parameters"):
        SSTAdamW(model.parameters())
    groups = spectral_groups(model)
    for change, message in [
        ({"rank": 2}, "Invalid rank: 2, expected None"),
        ({"samples_per_round": 0}, "Invalid samples_per_round: 0"),
        ({"warmup": -1}, "Invalid warmup: -1, expected a non-negative int"),
        ({"seed": 0.5}, "Invalid seed: 0.5"),
        ({"moments": "rotate"}, "Invalid moments: 'rotate', expected one of 'keep'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SSTAdamW([{**groups[0], **change}])
    for params in (groups[0]["params"][:4], [*groups[0]["params"], groups[0]["params"][0]]):
        with pytest.raises(ValueError, match="Invalid rank"):
            SSTAdamW([{"params": params, "rank": groups[0]["rank"]}])
