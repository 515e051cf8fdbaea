"""What is particular to FRUGAL: what is active, what is forgotten, the signs of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import FRUGALAdamW
from lowrank_optim.ops.dct import dct_matrix
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.reference.frugal import frugal


def step_with(optimizer: LowRankOptimizer, p: nn.Parameter, grad: Tensor) -> None:
    p.grad = grad
    optimizer.step()


def basis_of(state: dict[str, Any], d: int, projection: str) -> Tensor:
    """P, (d, rank), of selected columns too."""
    if projection in ("columns", "dct"):
        fixed = torch.eye(d, dtype=torch.float64) if projection == "columns" else dct_matrix(d).mT
        return fixed[:, state["indices"]]
    basis: Tensor = state["basis"].clone()
    return basis


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (10, 10)], ids=str)
@pytest.mark.parametrize("projection", ["columns", "svd", "dct", "random"])
@pytest.mark.parametrize("inactive_lr_scale", [1.0, 0.1, 0.0])
def test_the_formulas_of_the_paper(shape: tuple[int, int], projection: str, inactive_lr_scale: float) -> None:
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    common |= {"inactive_lr_scale": inactive_lr_scale}
    weight = torch.randn(shape, dtype=torch.float64)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(14)]
    p = nn.Parameter(weight.clone())
    optimizer = FRUGALAdamW([p], rank=3, update_proj_gap=5, projection=projection, **common)
    trajectory, bases = [], []
    for i, grad in enumerate(grads):
        step_with(optimizer, p, grad)
        trajectory.append(p.detach().clone())
        if i % 5 == 0:
            bases.append(basis_of(optimizer.state[p], min(shape), projection))
    assert not torch.equal(bases[0], bases[1]) and not torch.equal(bases[1], bases[2])
    expected = frugal(weight, grads, bases, gap=5, **common)
    torch.testing.assert_close(torch.stack(trajectory), torch.stack(expected), rtol=0, atol=1e-12)


def test_the_full_rank_rule_is_torch_adamw() -> None:
    p, q = (nn.Parameter(torch.ones(7)) for _ in range(2))
    ours = FRUGALAdamW([{"params": [p], "rank": None}], lr=0.01, weight_decay=0.1, eps=0.01, update_proj_gap=2)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1, eps=0.01)
    for _ in range(6):
        grad = torch.randn(7)
        step_with(ours, p, grad)
        q.grad = grad
        theirs.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("capturable", [False, True])
def test_stagger_restarts_the_count_at_its_own_refreshes(capturable: bool) -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(3)]
    options: dict[str, Any] = {"rank": 2, "update_proj_gap": 4, "capturable": capturable}
    optimizer = FRUGALAdamW(params, stagger=True, **options)
    resets: list[set[int]] = [set() for _ in params]
    for _ in range(12):
        for p in params:
            p.grad = torch.randn(8, 6)
        optimizer.step()
        for seen, p in zip(resets, params):
            seen.add(int(optimizer.state[p]["reset_step"]))
    # Steps before a refresh, counted from 0; the golden ratio moves the second layer by 2 and the third by 0.
    assert resets == [{0, 4, 8}, {0, 2, 6, 10}, {0, 4, 8}]


def test_columns_cover_the_matrix_in_time_and_never_repeat_within_a_draw() -> None:
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = FRUGALAdamW([p], rank=5, update_proj_gap=1)
    hits = torch.zeros(20)
    for _ in range(400):
        step_with(optimizer, p, torch.randn(30, 20))
        indices = optimizer.state[p]["indices"]
        assert len(set(indices.tolist())) == 5 and bool((indices.diff() > 0).all())
        hits[indices] += 1
    # 100 expected of each, with a standard deviation of 8.7.
    assert float((hits - 100).abs().max()) < 35


def test_columns_that_stay_keep_their_moments_where_asked() -> None:
    p = nn.Parameter(torch.zeros(9, 8))
    options: dict[str, Any] = {"rank": 5, "update_proj_gap": 3, "reset_moments": False, "betas": (0.5, 0.5)}
    optimizer = FRUGALAdamW([p], moments="rotate", **options)
    for _ in range(3):
        step_with(optimizer, p, torch.randn(9, 8))
    state = optimizer.state[p]
    full = torch.zeros(9, 8)
    full[:, state["indices"]] = state["exp_avg"]
    old = set(state["indices"].tolist())
    step_with(optimizer, p, torch.full((9, 8), 1e-20))
    assert old != set(state["indices"].tolist()) and old & set(state["indices"].tolist())
    torch.testing.assert_close(state["exp_avg"], 0.5 * full[:, state["indices"]], rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_outside_of_the_active_columns_is_seen(bad: float) -> None:
    p = nn.Parameter(torch.ones(8, 6))
    optimizer = FRUGALAdamW([p], rank=2, update_proj_gap=100)
    step_with(optimizer, p, torch.randn(8, 6))
    before = p.detach().clone()
    inactive = next(i for i in range(6) if i not in optimizer.state[p]["indices"])
    grad = torch.randn(8, 6)
    grad[3, inactive] = bad
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        step_with(optimizer, p, grad)
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


def test_large_half_precision_gradients_are_not_taken_for_bad_ones() -> None:
    p = nn.Parameter(torch.ones(64, 32, dtype=torch.float16))
    optimizer = FRUGALAdamW([p], rank=2)
    step_with(optimizer, p, torch.full((64, 32), 1000.0, dtype=torch.float16))
    assert bool((p.detach() != 1).all()) and bool(p.isfinite().all())


@pytest.mark.parametrize("projection", ["columns", "svd", "dct"])
def test_where_nobody_looks_a_bad_gradient_stays_out(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda _: False)
    p = nn.Parameter(torch.ones(8, 6))
    optimizer = FRUGALAdamW([p], rank=2, betas=(0.0, 0.999), projection=projection)
    step_with(optimizer, p, torch.randn(8, 6))
    before = p.detach().clone()
    for at in range(6):
        grad = torch.randn(8, 6)
        grad[3, at] = float("nan")
        step_with(optimizer, p, grad)
        assert torch.equal(p, before)


def test_experts_that_all_have_a_gradient_begin_anew_together() -> None:
    p = nn.Parameter(torch.zeros(2, 8, 6))
    optimizer = FRUGALAdamW([p], rank=2, update_proj_gap=2, betas=(0.5, 0.5), projection="svd")
    first = torch.randn(2, 8, 6)
    first[1] = 0
    step_with(optimizer, p, first)
    step_with(optimizer, p, first)
    step_with(optimizer, p, torch.randn(2, 8, 6))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], p.grad @ optimizer.state[p]["basis"] / 2)


@pytest.mark.parametrize(("proj_type", "rank"), [("std", 3), ("reverse_std", 6), ("left", 6), ("right", 3)], ids=str)
def test_density_is_a_share_of_the_compressed_side(proj_type: str, rank: int) -> None:
    p, bias = nn.Parameter(torch.ones(24, 12)), nn.Parameter(torch.ones(12))
    optimizer = FRUGALAdamW([p, bias], density=0.25, proj_type=proj_type)
    step_with(optimizer, p, torch.randn(24, 12))
    assert optimizer.state[p]["indices"].shape == (rank,)
    rows = optimizer.explain()
    assert (rows[0].method, rows[0].reason) == (f"rank {rank}", "density 0.25")
    assert (rows[1].method, rows[1].reason) == ("full-rank", "fewer than two dimensions")


def test_a_density_of_one_is_adamw() -> None:
    with pytest.warns(UserWarning, match="compresses no parameter"):
        optimizer = FRUGALAdamW([nn.Parameter(torch.ones(24, 12))], density=1.0)
    row = optimizer.explain()[0]
    assert (row.method, row.reason) == ("full-rank", "density 1 leaves nothing out")


def test_random_bases_are_orthonormal_and_uniform() -> None:
    p = nn.Parameter(torch.zeros(12, 5))
    optimizer = FRUGALAdamW([p], rank=3, update_proj_gap=1, projection="random")
    total = torch.zeros(5, 5)
    mean = torch.zeros(5, 3)
    for _ in range(500):
        step_with(optimizer, p, torch.randn(12, 5))
        basis = optimizer.state[p]["basis"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(3), atol=1e-5, rtol=0)
        total += basis @ basis.mT / 500
        mean += basis / 500
    assert float((total - 0.6 * torch.eye(5)).abs().max()) < 0.08
    assert float(mean.abs().max()) < 0.1


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("projection", ["columns", "svd", "dct", "random"])
def test_every_projection_on_every_side(projection: str, proj_type: str) -> None:
    """With SGD-like settings the active part of the update is the gradient's own projection."""
    p = nn.Parameter(torch.zeros(12, 7))
    options: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 1e6, "inactive_lr_scale": 0.0, "lr": 1e6}
    optimizer = FRUGALAdamW([p], rank=3, projection=projection, proj_type=proj_type, **options)
    grad = torch.randn(12, 7)
    step_with(optimizer, p, grad)
    state = optimizer.state[p]
    d = 12 if state["left"] else 7
    assert state["left"] == (proj_type in ("left", "reverse_std"))
    basis = basis_of(state, d, projection).float()
    assert basis.shape == (d, 3)
    expected = basis @ basis.mT @ grad if state["left"] else grad @ basis @ basis.mT
    torch.testing.assert_close(-p.detach(), expected, rtol=1e-3, atol=1e-4)


def test_dct_takes_the_columns_with_the_most_energy() -> None:
    p = nn.Parameter(torch.zeros(12, 9))
    optimizer = FRUGALAdamW([p], rank=2, projection="dct")
    waves = dct_matrix(9).float()
    step_with(optimizer, p, torch.randn(12, 2) @ waves[[1, 6]] + 0.01 * torch.randn(12, 9))
    assert optimizer.state[p]["indices"].tolist() == [1, 6]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"projection": "rows"}, "Invalid projection: 'rows', expected one of 'columns', "),
        ({"density": 1.5}, r"Invalid density: 1.5, expected a number in \[0, 1\]"),
        ({"inactive_lr_scale": -1}, "Invalid inactive_lr_scale: -1"),
        ({"proj_type": "full"}, "Invalid proj_type: 'full'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FRUGALAdamW([nn.Parameter(torch.ones(8, 6))], rank=2, **kwargs)
