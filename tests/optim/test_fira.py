"""What is particular to Fira, and the growth limiter that APOLLO shares."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import APOLLOAdamW, FiraAdamW
from lowrank_optim.ops.limited_scale import limited_scale
from lowrank_optim.ops.row_norms import row_norms
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.reference.fira import fira

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def step_with(optimizer: LowRankOptimizer, p: nn.Parameter, grad: Tensor) -> Tensor:
    before = p.detach().clone()
    p.grad = grad
    optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (10, 10)], ids=str)
@pytest.mark.parametrize("residual", ["reference", "paper"])
@pytest.mark.parametrize("gamma", [1.01, 1.3])
def test_the_formulas_of_the_paper(shape: tuple[int, int], residual: str, gamma: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    grads = [torch.randn(shape, dtype=torch.float64) * (6 if i == 7 else 1) for i in range(14)]
    expected = fira(weight, grads, rank=3, gap=5, alpha=0.3, gamma=gamma, residual=residual, **SETTINGS)
    p = nn.Parameter(weight.clone())
    options = {"rank": 3, "update_proj_gap": 5, "alpha": 0.3, "limiter_gamma": gamma, "refresh": "svd"}
    optimizer = FiraAdamW([p], residual=residual, **options, **SETTINGS)
    for grad, after in zip(grads, expected):
        step_with(optimizer, p, grad)
        torch.testing.assert_close(p.detach(), after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("inner", [0.25, 1.0])
def test_residual_norm_without_the_residual(dtype: torch.dtype, inner: float) -> None:
    grad = torch.randn(40, 24, dtype=dtype)
    basis = torch.linalg.qr(torch.randn(24, 8, dtype=dtype)).Q
    low = grad @ basis
    norms = torch.stack([row_norms(low).view(-1), row_norms(torch.randn(40, 8, dtype=dtype)).view(-1)])
    found = torch.zeros((), dtype=norms.dtype)
    phi, found, _ = limited_scale(norms, row_norms(grad), found, gamma=1.01, inner=inner)
    torch.testing.assert_close(phi.view(-1), norms[1] / (norms[0] + 1e-8))
    explicit = torch.linalg.vector_norm(phi * (grad - inner * low @ basis.mH))
    torch.testing.assert_close(found, explicit, rtol=2e-6, atol=0)


def test_residual_norm_is_a_number_where_rounding_makes_more_inside_than_there_is() -> None:
    of_grad = torch.full((3, 1), 1.0 - 1e-7)
    _, found, _ = limited_scale(torch.ones(2, 3), of_grad, torch.ones(()), gamma=1.01, inner=1.0)
    assert float(found) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_which_bases_count_as_orthonormal(dtype: torch.dtype) -> None:
    """32 bits and more are orthonormal to 1e-3, so that norms need no residual; bfloat16 is not."""
    basis = torch.linalg.qr(torch.randn(512, 128)).Q.to(dtype).double()
    off = torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(128, dtype=torch.float64), ord=2)
    assert (float(off) < 1e-3) == (torch.finfo(dtype).bits >= 32)


def test_a_small_residual_survives_bfloat16() -> None:
    """With 0.1 % of the energy outside, the identity would see thirty times the norm, the fused sum mostly noise."""
    inside = torch.linalg.qr(torch.randn(64, 4)).Q
    grad = (torch.randn(96, 4) @ inside.mT + 0.03 * torch.randn(96, 64) / 8).bfloat16()
    weights = []
    for dtype in (torch.float64, torch.bfloat16):
        p = nn.Parameter(torch.zeros(96, 64, dtype=dtype))
        optimizer = FiraAdamW([p], lr=1.0, rank=4, residual="paper", refresh="svd", alpha=1.0)
        step_with(optimizer, p, grad.to(dtype))
        basis = torch.linalg.svd(grad.double(), full_matrices=False).Vh[:4].mT
        weights.append((p.detach().double() @ (torch.eye(64) - basis @ basis.mT), optimizer.state[p]["update_norm"]))
    (exact, exact_norm), (ours, norm) = weights
    torch.testing.assert_close(norm.double(), exact_norm, rtol=0.05, atol=0)
    assert float((ours - exact).norm() / exact.norm()) < 0.2


def test_a_gradient_inside_the_subspace_has_no_residual() -> None:
    """The difference of nearly equal norms is never negative, and nearly nothing beside Adam's direction."""
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = FiraAdamW([p], rank=3, residual="paper", refresh="svd")
    for _ in range(3):
        step_with(optimizer, p, torch.randn(30, 2) @ torch.ones(2, 20))
    assert bool(p.isfinite().all())
    assert float(optimizer.state[p]["update_norm"]) < 1e-3 * (30 * 3) ** 0.5


def both(**kwargs: Any) -> list[tuple[LowRankOptimizer, nn.Parameter]]:
    """Fira and APOLLO on a parameter each."""
    params = [nn.Parameter(torch.zeros(24, 16)) for _ in range(2)]
    shared = {"lr": 1e-3, "rank": 4, "update_proj_gap": 1000, **kwargs}
    return [(FiraAdamW([params[0]], **shared), params[0]), (APOLLOAdamW([params[1]], **shared), params[1])]


def test_the_norm_grows_by_gamma_and_falls_freely() -> None:
    size = torch.ones(60)
    size[20:40], size[40:] = 50.0, 0.1
    for (limited, p), (free, q) in zip(both(), both(limiter_gamma=None)):
        norms, unlimited = [], []
        for factor in size:
            grad = factor * torch.randn(24, 16)
            step_with(limited, p, grad)
            norms.append(float(limited.state[p]["update_norm"]))
            unlimited.append(float(step_with(free, q, grad).norm()))
        growth = torch.tensor(norms)[1:] / torch.tensor(norms)[:-1]
        assert float(growth.max()) <= 1.01 * (1 + 1e-5)
        assert float(growth.min()) < 0.8
        assert max(b / a for a, b in pairwise(unlimited)) > 1.5


def test_update_norm_is_the_norm_of_what_was_applied() -> None:
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = APOLLOAdamW([p], lr=1e-3, rank=4, scale=2.0)
    for _ in range(5):
        moved = step_with(optimizer, p, torch.randn(24, 16))
    state = optimizer.state[p]
    correction = (1 - 0.999**5) ** 0.5 / (1 - 0.9**5)
    torch.testing.assert_close(moved.norm(), 1e-3 * correction * 2**0.5 * state["update_norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [0.0, 1e-30, 1e-12], ids=str)
@pytest.mark.parametrize("at", [0, 6])
def test_a_dead_gradient_does_not_freeze_the_layer(first: float, at: int) -> None:
    """Published: a norm of 0 may grow by 1 % a step from 1e-8, which takes 1600 steps."""
    for (burdened, p), (clean, q) in zip(both(), both()):
        for step in range(12):
            grad = torch.randn(24, 16)
            ours = step_with(burdened, p, first * grad if step == at else grad)
            theirs = step_with(clean, q, grad)
            if step == at:
                assert float(ours.norm()) < 1e-3 * float(theirs.norm()) or at > 0
            if step > at + 3:
                assert 0.3 < float(ours.norm() / theirs.norm()) < 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_nobody_looks_a_bad_gradient_stays_out(
    bad: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda _: False)
    for optimizer, p in both():
        p.data = p.data.to(dtype)
        step_with(optimizer, p, torch.randn(24, 16, dtype=dtype))
        before, norm = p.detach().clone(), optimizer.state[p]["update_norm"].clone()
        grad = torch.randn(24, 16, dtype=dtype)
        grad[3, 5] = bad
        step_with(optimizer, p, grad)
        assert bool(p.isfinite().all())
        assert torch.equal(optimizer.state[p]["update_norm"], norm)
        if isinstance(optimizer, APOLLOAdamW):
            assert torch.equal(p, before)


def test_a_norm_beyond_the_range_of_fp32_moves_nothing() -> None:
    for optimizer, p in both():
        step_with(optimizer, p, torch.randn(24, 16))
        step_with(optimizer, p, 1e25 * torch.randn(24, 16))
        assert bool(p.isfinite().all()) and bool(optimizer.state[p]["update_norm"].isfinite())


def test_one_rounding_of_a_bfloat16_weight() -> None:
    """The two parts of Fira's update are added before the weight is rounded: half a unit in the last place, not one."""
    p, q = nn.Parameter(torch.ones(64, 48)), nn.Parameter(torch.ones(64, 48, dtype=torch.bfloat16))
    exact, rounded = (FiraAdamW([w], lr=0.01, rank=4, alpha=1.0, refresh="svd") for w in (p, q))
    grad = torch.randn(64, 48).bfloat16()
    step_with(exact, p, grad.float())
    step_with(rounded, q, grad)
    # Between 1/2 and 1 bfloat16 has steps of 2^-8, above 1 of 2^-7; the update itself is good to 1 %.
    off = (q.detach().float() - p.detach()).abs()
    step = torch.where(p.detach() < 1, 2.0**-8, 2.0**-7)
    assert float((off - 0.01 * (p.detach() - 1).abs() - step / 2).max()) <= 1e-6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": -1}, r"Invalid alpha: -1, expected a number in \[0, inf\)"),
        ({"residual": "code"}, "Invalid residual: 'code', expected one of 'reference', 'paper'"),
        ({"limiter_gamma": 0.9}, r"Invalid limiter_gamma: 0.9, expected a number in \[1, inf\)"),
        ({"proj_type": "full"}, "Invalid proj_type: 'full', expected one of 'std', 'reverse_std', 'left', 'right'"),
        ({"refresh": "qr"}, "Invalid refresh: 'qr'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiraAdamW([nn.Parameter(torch.ones(8, 6))], rank=2, **kwargs)


def test_published_groups_are_taken() -> None:
    matrix, bias = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(6))
    published = {"params": [matrix], "rank": 2, "update_proj_gap": 10, "alpha": 0.5, "proj_type": "std"}
    optimizer = FiraAdamW([{"params": [bias]}, published])
    assert [row.method for row in optimizer.explain()] == ["full-rank", "rank 2"]
    matrix.grad, bias.grad = torch.randn(8, 6), torch.randn(6)
    optimizer.step()
    assert "update_norm" in optimizer.state[matrix] and "update_norm" not in optimizer.state[bias]


@pytest.mark.parametrize(("dtype", "asks"), [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)])
def test_which_weights_have_their_scales_from_a_kernel(
    dtype: torch.dtype, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def picked(operation: Any, backend: Any, device: torch.device) -> Any:
        asked.append(operation)
        return operation

    monkeypatch.setattr("lowrank_optim.optim.lifts.norm_scaling.pick", picked)
    p = nn.Parameter(torch.zeros(12, 7, dtype=dtype))
    optimizer = FiraAdamW([p], rank=3)
    p.grad = torch.randn(12, 7).to(dtype)
    optimizer.step()
    assert bool(asked) is asks
