"""GaLoreAdafactor: the published trajectory, the formulas in float64, its own arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import NewTensors
from lowrank_optim import GaLoreAdafactor
from lowrank_optim.optim.adafactor import Adafactor
from tests.conftest import GOLDEN
from tests.reference.adafactor import galore_adafactor


def run(p: nn.Parameter, grads: Any, **kwargs: Any) -> list[np.ndarray]:
    # The second parameter keeps the optimizer from warning about a lone vector.
    optimizer = GaLoreAdafactor([p, nn.Parameter(torch.ones(9, 9))], **kwargs)
    trajectory = []
    for grad in grads:
        p.grad = torch.tensor(grad, dtype=p.dtype)
        optimizer.step()
        trajectory.append(p.detach().numpy().copy())
    return trajectory


@pytest.mark.parametrize("shape", ["tall", "wide", "square", "vector"])
def test_the_published_trajectory_is_met(
    shape: str,
    golden_config: dict[str, Any],
    golden_inputs: dict[str, np.ndarray],
    record_reference_error: Callable[..., None],
) -> None:
    expected = np.load(GOLDEN / "galore_adafactor_std.npz")[f"param/{shape}"]
    start = golden_inputs[f"param/{shape}"]
    kwargs = golden_config["methods"]["galore_adafactor_std"]
    trajectory = run(nn.Parameter(torch.tensor(start)), golden_inputs[f"grad/{shape}"], refresh="svd", **kwargs)
    assert len(expected) == len(golden_config["kept_steps"])
    ours = [trajectory[step - 1] for step in golden_config["kept_steps"]]
    record_reference_error("GaLoreAdafactor", ours, expected, start)
    displacement = np.abs(expected[-1] - start).max()
    for a, b in zip(ours, expected):
        assert np.abs(a - b).max() <= 1e-5 * displacement


@pytest.mark.parametrize("shape", [(14, 6), (6, 14), (8, 8)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "scale_parameter": False},
        {"lr": 0.02, "beta1": 0.9, "weight_decay": 0.3},
        {"clip_threshold": 0.5, "decay_rate": -0.5, "eps": (1e-4, 1e-2)},
        {"warmup_init": True, "beta1": 0.5, "weight_decay": 0.1},
    ],
    ids=["plain", "mean", "clipped", "warm-up"],
)
def test_the_formulas_in_float64(shape: tuple[int, int], options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    start = random.standard_normal(shape)
    grads = random.standard_normal((14, *shape)) * np.geomspace(1e-3, 1e3, 14)[:, None, None]
    p = nn.Parameter(torch.tensor(start))
    ours = run(p, grads, rank=3, update_proj_gap=5, scale=0.3, refresh="svd", **options)
    names = {"clip_threshold": "clip"}
    theirs = galore_adafactor(
        start, list(grads), rank=3, gap=5, scale=0.3, **{names.get(k, k): v for k, v in options.items()}
    )
    for a, b in zip(ours, theirs):
        # Each of 14 updates rounds the weights themselves.
        rounding = 14 * np.finfo(np.float64).eps
        np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding + 1e-12 * np.abs(theirs[-1] - start).max())


def test_the_state_is_factored_in_the_subspace() -> None:
    p, vector = nn.Parameter(torch.ones(12, 7)), nn.Parameter(torch.ones(5))
    optimizer = GaLoreAdafactor([p, vector], rank=4)
    p.grad, vector.grad = torch.randn(12, 7), torch.randn(5)
    optimizer.step()
    shapes = {k: tuple(v.shape) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    assert shapes == {"basis": (7, 4), "exp_avg_sq_row": (12,), "exp_avg_sq_col": (4,)}
    assert set(optimizer.state[vector]) == {"step", "seed", "exp_avg_sq"}


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_fewer_bits_of_the_mean_update_change_little(state_dtype: str, tolerance: float) -> None:
    def displacement(state_dtype: str) -> torch.Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(1024, 12))
        optimizer = GaLoreAdafactor([p], lr=0.01, beta1=0.9, rank=4, scale_parameter=False, state_dtype=state_dtype)
        for _ in range(10):
            p.grad = torch.randn(1024, 12)
            optimizer.step()
        stored = {key: value.dtype for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
        assert stored["exp_avg_sq_row"] == torch.float32
        kept = {"int8": ("exp_avg.codes", torch.uint8), "bfloat16": ("exp_avg", torch.bfloat16)}
        key, dtype = kept.get(state_dtype, ("exp_avg", torch.float32))
        assert stored[key] == dtype
        return p.detach()

    exact = displacement("float32")
    error = float((displacement(state_dtype) - exact).norm() / exact.norm())
    assert 0 < error < tolerance


def test_a_learning_rate_of_zero_leaves_no_mean_behind() -> None:
    """Schedules with warm-up start at zero; a mean of directions would then move the weight at the second update."""
    p = nn.Parameter(torch.ones(12, 7))
    optimizer = GaLoreAdafactor([p], lr=0.0, beta1=0.9, rank=4)
    p.grad = torch.randn(12, 7)
    optimizer.step()
    assert torch.equal(p, torch.ones(12, 7))
    assert not optimizer.state[p]["exp_avg"].any()


def test_rotation_moves_the_column_means_and_the_mean_update() -> None:
    rule, group = Adafactor(), {"beta1": 0.9, "state_dtype": "float32", "backend": None}
    low = torch.randn(6, 3, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    state = {"exp_avg_sq_col": low.square().mean(0), "exp_avg": low.clone()}
    before = state["exp_avg_sq_col"].clone()
    rule.transport(state, turn, group)
    torch.testing.assert_close(state["exp_avg"], low @ turn)
    torch.testing.assert_close(state["exp_avg_sq_col"], before @ turn.square())

    state = {"exp_avg_sq_col": torch.tensor([1.0, 2.0, 6.0]), "exp_avg": torch.tensor([[1.0, 2.0, 3.0]])}
    rule.transport(state, torch.tensor([2, -1, 0]), group)
    assert state["exp_avg_sq_col"].tolist() == [6.0, 3.0, 1.0]
    assert state["exp_avg"].tolist() == [[3.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0.1, "relative_step": True}, "Invalid relative_step: True with lr=0.1, expected True exactly where"),
        ({"relative_step": False}, "Invalid relative_step: False with lr=None"),
        ({"relative_step": "no"}, "Invalid relative_step: 'no', expected one of None, True, False"),
        ({"lr": 0.1, "warmup_init": True}, "Invalid warmup_init: True with lr=0.1, expected lr=None"),
        ({"eps": (0.0, 1e-3)}, r"Invalid eps\[0\]: 0.0, expected a number in"),
        ({"eps": (1e-30, -1.0)}, r"Invalid eps\[1\]: -1.0, expected a number in \[0, inf\)"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold: 0.0"),
        ({"decay_rate": 0.8}, r"Invalid decay_rate: 0.8, expected a number in \[-inf, 0\]"),
        ({"beta1": 1.0}, r"Invalid beta1: 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdafactor([nn.Parameter(torch.ones(9, 9))], rank=4, **kwargs)


def test_a_step_makes_no_full_size_tensor() -> None:
    p = nn.Parameter(torch.ones(40, 30))
    optimizer = GaLoreAdafactor([p], rank=4, beta1=0.9, weight_decay=0.1)
    for _ in range(2):
        p.grad = torch.randn(40, 30)
        optimizer.step()
    with NewTensors(1) as any_size:
        optimizer.step()
    # Low-rank tensors have 160 elements.
    with NewTensors(161) as larger:
        optimizer.step()
    assert any_size.count > 0 and larger.count == 0


@pytest.mark.parametrize("step", [4, torch.tensor(4.0)], ids=["int", "tensor"])
@pytest.mark.parametrize(("warmup_init", "size"), [(True, 4e-6), (False, 1e-2)])
def test_early_relative_steps_have_a_ceiling(step: int | Tensor, warmup_init: bool, size: float) -> None:
    p = nn.Parameter(torch.ones(9, 9))
    capturable = isinstance(step, Tensor)
    optimizer = GaLoreAdafactor([p], rank=4, warmup_init=warmup_init, scale_parameter=False, capturable=capturable)
    group = optimizer.param_groups[0]
    optimizer.init_state(p, group)["step"] = step
    found = optimizer.step_size(optimizer.plan_of(p, group), p, group)[0]
    assert float(found) == pytest.approx(size)


def test_without_a_mean_of_updates_only_the_second_moment_turns() -> None:
    p = nn.Parameter(torch.ones(12, 9))
    optimizer = GaLoreAdafactor([p], rank=4, update_proj_gap=1, moments="rotate", beta1=None)
    for _ in range(3):
        p.grad = torch.randn(12, 9)
        optimizer.step()
    assert p.isfinite().all() and "exp_avg" not in optimizer.state[p]
