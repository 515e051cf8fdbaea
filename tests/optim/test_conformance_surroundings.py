"""Ambient defaults, autocast, fp16, distributed checkpoints and per-layer updates, in every row of the table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lowrank_optim import step_in_backward
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.subspaces.fixed_basis import BUILT
from tests.conformance import (
    defaults,
    every_variant,
    gradients,
    noise,
    parameters,
    quiet,
    same,
    snapshot,
    train,
    values,
)

FEW = [(12, 7), (7, 12), (2, 9, 6), (5,)]


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "defaults": lambda: defaults("meta", torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@every_variant
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_callers_surroundings_change_nothing(name: str, kwargs: dict[str, Any], surroundings: str) -> None:
    params, others = parameters(FEW), parameters(FEW)
    plain = quiet(name, params, **kwargs)
    train(plain, params, range(5))
    # A basis that the whole process shares is made in there, too.
    BUILT.clear()
    with SURROUNDINGS[surroundings]():
        optimizer = quiet(name, others, **kwargs)
        train(optimizer, others, range(3))
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        train(optimizer, others, range(3, 5))
        optimizer.explain()
    # Of the groups only what torch adds to a loaded one may differ.
    assert same(snapshot(plain)[1:], snapshot(optimizer)[1:])


def run_in_backward(
    name: str, kwargs: dict[str, Any], surroundings: Callable[[], Any], accumulate: int, updates: int = 8
) -> tuple[LowRankOptimizer, list[nn.Parameter]]:
    params = parameters(FEW)
    optimizer = quiet(name, params, **kwargs)
    handle = step_in_backward(optimizer, accumulate=accumulate, max_norm=1.0)
    for update in range(updates):
        for micro in range(accumulate):
            with handle.micro_batch():
                losses = [(p * g).sum() for p, g in zip(params, gradients(params, 10 * update + micro))]
                loss = torch.stack(losses).sum()
                with surroundings():
                    loss.backward()
    handle.remove()
    return optimizer, params


@every_variant
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_autocast_around_a_backward_pass_with_updates_changes_nothing(
    name: str, kwargs: dict[str, Any], accumulate: int
) -> None:
    optimizer, params = run_in_backward(name, kwargs, nullcontext, accumulate)
    other, others = run_in_backward(name, kwargs, SURROUNDINGS["autocast"], accumulate)
    # Over two refreshes after the first.
    assert all(int(state["step"]) == 8 for state in optimizer.state.values())
    assert all(bool(p.isfinite().all()) for p in params)
    assert not torch.equal(params[0], parameters(FEW)[0])
    assert same(values(optimizer, params), values(other, others))


@every_variant
def test_micro_batches_of_one_update_without_two_phases_are_the_sum(name: str, kwargs: dict[str, Any]) -> None:
    """Where sums at low rank are not taken, an accumulated run is the run on summed gradients."""
    params, others = parameters(FEW), parameters(FEW)
    optimizer, plain = quiet(name, params, **kwargs), quiet(name, others, **kwargs)
    handle = step_in_backward(optimizer, accumulate=2, two_phase=False)
    for update in range(8):
        first, second = (gradients(params, 10 * update + micro) for micro in range(2))
        for grads in (first, second):
            with handle.micro_batch():
                torch.stack([(p * g).sum() for p, g in zip(params, grads)]).sum().backward()
        for p, a, b in zip(others, first, second):
            p.grad = a + b
        plain.step()
    assert same(values(optimizer, params), values(plain, others))


@every_variant
def test_what_joins_under_step_in_backward_is_trained(name: str, kwargs: dict[str, Any]) -> None:
    params = parameters(FEW)
    params[1].requires_grad_(False)
    optimizer = quiet(name, params[:2], **kwargs)
    handle = step_in_backward(optimizer)
    before = [p.detach().clone() for p in params]
    for step in range(4):
        if step == 1:
            params[1].requires_grad_(True)
        if step == 2:
            optimizer.add_param_group({"params": params[2:], "rank": optimizer.param_groups[0]["rank"]})
        held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        grads = gradients(params, step)
        torch.stack([(p * g).sum() for p, g in zip(params, grads) if p in held]).sum().backward()
        assert all(p.grad is None for p in params)
    counted = [int(optimizer.state[p]["step"]) for p in params]
    assert counted == [4, 3, 2, 2]
    assert all(not torch.equal(p, b) for p, b in zip(params, before))
    handle.remove()


@every_variant
def test_finite_float16_gradients_are_never_dropped(name: str, kwargs: dict[str, Any]) -> None:
    """Projections and sums of these are above 65504."""
    kwargs = {key: value for key, value in kwargs.items() if key != "weight_rounding"}
    params = parameters(FEW, torch.float16)
    optimizer = quiet(name, params, **kwargs)
    for _ in range(4):
        for p, draw in zip(params, noise([p.shape for p in params], 3)):
            p.grad = torch.full_like(p, 30000.0).copysign(draw.abs() + 1).to(torch.float16)
            assert bool(p.grad.isfinite().all())
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4] * len(params)
    for p in params:
        assert bool(p.isfinite().all())
        assert not torch.equal(p, parameters([p.shape], torch.float16)[0])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("GaLoreAdamW", {}), ("GaLoreAdamW", {"refresh": "randomized"}), ("DCTAdamW", {"update_proj_gap": 3})],
    ids=str,
)
def test_sums_of_finite_float16_gradients_renew_the_basis(name: str, kwargs: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(64, 16, dtype=torch.float16))
    optimizer = quiet(name, [p], **kwargs)
    handle = step_in_backward(optimizer, accumulate=2)
    bases = []
    for update in range(6):
        for micro in range(2):
            with handle.micro_batch():
                draw = noise([p.shape], 10 * update + micro)[0]
                (p * (30000 * (1 + 0.1 * draw)).to(torch.float16)).sum().backward()
        # Columns of the DCT are a basis by their numbers.
        bases.append(optimizer.state[p].get("basis", optimizer.state[p].get("indices")).clone())
    assert int(optimizer.state[p]["step"]) == 6
    assert not torch.equal(bases[0], bases[-1])
    handle.remove()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, p in enumerate(parameters(FEW)):
            setattr(self, f"weight{i}", p)


def updates(model: Model, handle: Any, steps: range) -> None:
    params = list(model.parameters())
    for step in steps:
        for micro in range(2):
            with handle.micro_batch():
                grads = gradients(params, 10 * step + micro)
                torch.stack([(p * g).sum() for p, g in zip(params, grads)]).sum().backward()


@every_variant
@pytest.mark.parametrize("at", [4, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*torch.distributed", "ignore:.*TypedStorage", "ignore:.*kept an old basis")
def test_a_distributed_checkpoint_continues_alike(name: str, kwargs: dict[str, Any], at: int, tmp_path: Path) -> None:
    """With updates of two micro-batches, between the two phases of a refresh (4) and not (5)."""
    model, other = Model(), Model()
    optimizer = quiet(name, list(model.named_parameters()), **kwargs)
    handle = step_in_backward(optimizer, accumulate=2, max_norm=1.0)
    updates(model, handle, range(at))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path)
    resumed = quiet(name, list(other.named_parameters()), **kwargs)
    theirs = step_in_backward(resumed, accumulate=2, max_norm=1.0)
    target = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(target, checkpoint_id=tmp_path)
    other.load_state_dict(target["model"])
    set_optimizer_state_dict(other, resumed, target["optimizer"])
    for group in resumed.param_groups:
        for p in group["params"]:
            assert not any(value is p.grad for value in resumed.state[p].values())
    updates(model, handle, range(at, at + 3))
    updates(other, theirs, range(at, at + 3))
    assert same(values(optimizer, model.parameters()), values(resumed, other.parameters()))


def test_the_norm_that_clipping_remembers_is_in_the_state_of_the_optimizer() -> None:
    optimizer, params = run_in_backward("GaLoreAdamW", {}, nullcontext, 1, updates=3)
    norm = optimizer.state_dict()["param_groups"][0]["clip_norm"]
    expected = torch.stack([g.norm() for g in gradients(params, 20)]).norm()
    assert isinstance(norm, Tensor)
    torch.testing.assert_close(norm, expected)
    resumed = quiet("GaLoreAdamW", parameters(FEW))
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.param_groups[0]["clip_norm"], norm)
