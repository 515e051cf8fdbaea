"""What is particular to LoRA-Pre."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LoRAPre
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.reference.lora_pre import lora_pre
from tests.temporaries import CountTemporaries

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def trained(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Any) -> Tensor:
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach()


def started(optimizer: LowRankOptimizer, p: nn.Parameter) -> dict[str, Any]:
    """The state before the first step."""
    return optimizer.init_state(p, optimizer.param_groups[0])


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)], ids=str)
@pytest.mark.parametrize("debias", ["published", "factor"])
def test_the_formulas_of_the_paper(shape: tuple[int, int], debias: str) -> None:
    weight, *grads = torch.randn(13, *shape, dtype=torch.float64)
    p = nn.Parameter(weight.clone())
    options: dict[str, Any] = {"scale": 0.3, "damping": 1e-4, "debias": debias}
    optimizer = LoRAPre([p], rank=3, **options, **SETTINGS)
    state = started(optimizer, p)
    starts = state["exp_avg.right"].mT.clone(), state["exp_avg_sq.right"].mT.clone()
    expected = lora_pre(weight, grads, starts, **options, **SETTINGS)
    for grad, after in zip(grads, expected, strict=True):
        torch.testing.assert_close(trained(optimizer, p, [grad]), after, rtol=0, atol=1e-10)


def test_factors_start_from_zero_and_from_normal_numbers_of_their_own() -> None:
    states = []
    for name in ("layers.0.weight", "layers.1.weight"):
        p = nn.Parameter(torch.zeros(400, 300))
        states.append(started(LoRAPre([(name, p)], rank=16), p))
    rights = [state[f"{key}.right"] for state in states for key in ("exp_avg", "exp_avg_sq")]
    for right in rights:
        assert float(right.std()) == pytest.approx(0.02, rel=0.05) and abs(float(right.mean())) < 1e-3
    assert len({float(right[0, 0]) for right in rights}) == 4
    assert all(bool((state["exp_avg.left"] == 0).all()) for state in states)


@pytest.mark.parametrize("debias", ["published", "factor"])
def test_the_first_step_is_adams(debias: str) -> None:
    grad, params = torch.randn(1, 14, 9), [nn.Parameter(torch.ones(14, 9)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    ours = trained(LoRAPre([params[0]], rank=3, scale=1.0, debias=debias, **options), params[0], grad)
    torch.testing.assert_close(ours, trained(torch.optim.AdamW([params[1]], **options), params[1], grad))


def test_a_matrix_that_is_no_larger_than_the_rank_gets_adamw() -> None:
    grads, params = torch.randn(3, 14, 9), [nn.Parameter(torch.ones(14, 9)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    with pytest.warns(UserWarning, match="compresses no parameter"):
        ours = LoRAPre([params[0]], rank=9, **options)
    theirs = trained(torch.optim.AdamW([params[1]], **options), params[1], grads)
    torch.testing.assert_close(trained(ours, params[0], grads), theirs)


def product(state: dict[str, Any]) -> Tensor:
    factors: Tensor = state["exp_avg.left"] @ state["exp_avg.right"].mT
    return factors


def test_an_unchanging_gradient_of_the_rank_is_a_fixed_point_and_is_reached() -> None:
    goal = torch.randn(14, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
    optimizer = LoRAPre([p], rank=3, damping=0.0)
    state, errors = started(optimizer, p), []
    for steps in (1, 9, 40, 150):
        trained(optimizer, p, goal.expand(steps, 14, 9))
        errors.append(float((product(state) - goal).norm() / goal.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.9 and errors[1] < 0.7 and errors[2] < 0.1 and errors[3] < 1e-4
    u, s, vh = torch.linalg.svd(goal)
    state["exp_avg.left"].copy_(u[:, :3] * s[:3].sqrt())
    state["exp_avg.right"].copy_(vh[:3].mT * s[:3].sqrt())
    trained(optimizer, p, [goal])
    torch.testing.assert_close(product(state), goal)


def test_a_transposed_problem_has_the_transposed_solution() -> None:
    grads, moved = torch.randn(5, 14, 9, dtype=torch.float64), []
    for turned in (False, True):
        p = nn.Parameter(torch.zeros((9, 14) if turned else (14, 9), dtype=torch.float64))
        optimizer = LoRAPre([p], rank=3)
        state = started(optimizer, p)
        for key in ("exp_avg", "exp_avg_sq"):
            for seed, side, size in ((1, "left", 14), (2, "right", 9)):
                other = {"left": "right", "right": "left"}[side] if turned else side
                drawn = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                state[f"{key}.{other}"].copy_(drawn)
        moved.append(trained(optimizer, p, grads.mT if turned else grads))
    torch.testing.assert_close(moved[0], moved[1].mT)


def test_the_published_correction_makes_long_steps_and_that_of_factors_does_not() -> None:
    """The mean square of a step against unit Gaussians whose mean is 1: Adam's are near 1."""
    sizes = {}
    for debias in ("published", "factor"):
        p = nn.Parameter(torch.zeros(24, 16))
        optimizer = LoRAPre([p], lr=1.0, rank=2, scale=1.0, debias=debias)
        trained(optimizer, p, 1 + 0.1 * torch.randn(99, 24, 16))
        before = p.detach().clone()
        sizes[debias] = float((trained(optimizer, p, torch.ones(1, 24, 16)) - before).square().mean().sqrt())
    assert sizes["factor"] == pytest.approx(1, abs=0.1)
    assert sizes["published"] > 4


def test_gradients_of_low_rank_and_of_any_size_leave_factors_finite() -> None:
    for size in (1e-20, 1e-3, 1e6):
        for rank in (1, 3):
            p = nn.Parameter(torch.zeros(30, 20))
            optimizer = LoRAPre([p], rank=8)
            grad = size * torch.randn(30, rank) @ torch.randn(rank, 20)
            trained(optimizer, p, grad.expand(60, 30, 20))
            values = [v for v in optimizer.state[p].values() if isinstance(v, Tensor)]
            assert all(bool(v.isfinite().all()) for v in (*values, p))
            if size > 1e-20:
                assert float((product(optimizer.state[p]) - grad).norm() / grad.norm()) < 0.2


def test_state_and_temporaries() -> None:
    for device in ("cpu", "meta"):
        p = nn.Parameter(torch.ones(96, 64, device=device))
        optimizer = LoRAPre([p], rank=4, weight_decay=0.1, state_dtype="int8")
        state = started(optimizer, p)
        assert sum(v.nbytes for v in state.values() if isinstance(v, Tensor)) == 4 * 2 * 4 * (96 + 64)
        p.grad = torch.ones(96, 64, device=device)
        with CountTemporaries(p.numel()) as count:
            optimizer.step()
        assert len(count.created) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"damping": -1.0}, "Invalid damping: -1.0"),
        ({"debias": "none"}, "Invalid debias: 'none', expected one of 'published', 'factor'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAPre([nn.Parameter(torch.ones(8, 8))], rank=2, **kwargs)
