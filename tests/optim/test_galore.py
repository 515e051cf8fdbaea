"""What is particular to GaLore: sides, refreshes, equivalences, bad gradients."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.subspaces.singular import draw_spectral


def step_with(optimizer: LowRankOptimizer, p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad
    optimizer.step()


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of span(a) that lies in span(b), 1 where they are equal."""
    return float((a.mH @ b).abs().square().sum() / a.shape[1])


@pytest.mark.parametrize(
    ("proj_type", "shape", "left"),
    [
        ("std", (12, 7), False),
        ("std", (7, 12), True),
        ("std", (9, 9), False),
        ("reverse_std", (12, 7), True),
        ("reverse_std", (7, 12), False),
        ("reverse_std", (9, 9), True),
        ("left", (12, 7), True),
        ("right", (7, 12), False),
    ],
)
def test_sides(proj_type: str, shape: tuple[int, int], left: bool) -> None:
    p = nn.Parameter(torch.zeros(shape))
    optimizer = GaLoreAdamW([p], rank=3, proj_type=proj_type)
    step_with(optimizer, p, torch.randn(shape))
    compressed, rest = shape if left else shape[::-1]
    assert optimizer.state[p]["left"] is left
    assert optimizer.state[p]["basis"].shape == (compressed, 3)
    assert optimizer.state[p]["exp_avg"].shape == (rest, 3)


@pytest.mark.parametrize("refresh", ["svd", "randomized", "power"])
@pytest.mark.parametrize("stagger", [False, True])
def test_refresh_schedule(refresh: str, stagger: bool) -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(5)]
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=5, refresh=refresh, stagger=stagger)
    renewed: list[list[int]] = [[] for _ in params]
    for step in range(1, 17):
        old = [optimizer.state[p]["basis"].clone() if optimizer.state[p] else None for p in params]
        for p in params:
            p.grad = torch.randn(8, 6)
        optimizer.step()
        for steps, p, basis in zip(renewed, params, old):
            if basis is None or not torch.equal(basis, optimizer.state[p]["basis"]):
                steps.append(step)
    if not stagger:
        assert renewed == [[1, 6, 11, 16]] * 5
    else:
        assert all(steps[0] == 1 and set(np.diff(steps[1:])) == {5} for steps in renewed)
        # Five layers, a gap of five: after the first step no two refresh together.
        assert len({steps[1] % 5 for steps in renewed}) == 5


@pytest.mark.parametrize("refresh", ["svd", "randomized", "power"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e18])
def test_the_basis_is_orthonormal_and_dominant(refresh: str, dtype: torch.dtype, magnitude: float) -> None:
    u, _ = torch.linalg.qr(torch.randn(40, 20, dtype=dtype))
    v, _ = torch.linalg.qr(torch.randn(20, 20, dtype=dtype))
    grad = magnitude * (u * torch.logspace(0, -4, 20)) @ v.mH
    p = nn.Parameter(torch.zeros_like(grad))
    optimizer = GaLoreAdamW([p], rank=5, refresh=refresh, update_proj_gap=1)
    for _ in range(3):
        step_with(optimizer, p, grad)
    basis = optimizer.state[p]["basis"]
    torch.testing.assert_close(basis.mH @ basis, torch.eye(5, dtype=dtype), atol=1e-5, rtol=0)
    assert overlap(v[:, :5], basis) > 0.999


@pytest.mark.parametrize(("moments", "moved"), [("keep", -1.0), ("align", 1.0), ("rotate", 1.0)])
def test_moments_follow_a_basis_that_turns_its_sign(
    moments: str, moved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same subspace with the opposite sign: kept moments point backwards, the others do not."""
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, moments=moments)
    grad = torch.randn(8, 2) @ torch.randn(2, 6)
    step_with(optimizer, p, grad)
    step_with(optimizer, p, grad)
    lifted = optimizer.state[p]["exp_avg"] @ optimizer.state[p]["basis"].mT
    second = (optimizer.state[p]["exp_avg_sq"]).clone()
    turned = -optimizer.state[p]["basis"]
    monkeypatch.setattr("lowrank_optim.optim.subspaces.singular.top_basis", lambda *_, **__: turned)
    step_with(optimizer, p, torch.full_like(grad, 1e-12))
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg"] @ state["basis"].mT, 0.9 * moved * lifted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * second, atol=1e-6, rtol=1e-4)


def test_rotated_moments_are_projected_onto_the_new_basis() -> None:
    p = nn.Parameter(torch.zeros(9, 6))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=2, moments="rotate", refresh="svd")
    for _ in range(2):
        step_with(optimizer, p, torch.randn(9, 6))
    lifted = optimizer.state[p]["exp_avg"] @ optimizer.state[p]["basis"].mT
    grad = torch.randn(9, 6)
    step_with(optimizer, p, grad)
    basis = optimizer.state[p]["basis"]
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], (0.9 * lifted + 0.1 * grad) @ basis)
    assert bool((optimizer.state[p]["exp_avg_sq"] > 0).all())


def test_a_rank_that_does_not_compress_is_adam() -> None:
    # torch adds eps after the bias correction; with eps = 0 and no decay the two formulas are the same.
    p, q = (nn.Parameter(torch.full((6, 9), 0.5)) for _ in range(2))
    with pytest.warns(UserWarning, match="rank=6 compresses no parameter"):
        ours = GaLoreAdamW([p], lr=0.01, eps=0.0, rank=6, scale=0.1)
    theirs = torch.optim.AdamW([q], lr=0.01, eps=0.0, weight_decay=0.0)
    for _ in range(6):
        grad = torch.randn(6, 9)
        step_with(ours, p, grad)
        q.grad = grad
        theirs.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("refresh", ["randomized", "svd"])
def test_a_basis_may_have_more_columns_than_the_gradient_has_rows(refresh: str) -> None:
    """A depthwise convolution: its 16 filters have 9 values each."""
    p = nn.Parameter(torch.zeros(16, 1, 3, 3))
    optimizer = GaLoreAdamW([p], rank=12, refresh=refresh)
    grad = torch.randn_like(p)
    step_with(optimizer, p, grad)
    basis, filters = optimizer.state[p]["basis.0"], grad.flatten(1)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(12), rtol=0, atol=1e-5)
    # Nothing of the gradient lies outside.
    torch.testing.assert_close(basis @ (basis.mT @ filters), filters, rtol=0, atol=1e-5)


def test_a_complete_tucker_basis_only_turns_the_gradient() -> None:
    """beta1 = beta2 = 0 and eps so large that the direction is R / eps: the lift must return the gradient."""
    p = nn.Parameter(torch.zeros(6, 5, 4))
    groups = [{"params": [p], "param_roles": ["convolution"], "rank": 4}]
    optimizer = GaLoreAdamW(groups, lr=1.0, betas=(0.0, 0.0), eps=1e6, scale=1e6, refresh="svd")
    core = torch.randn(4, 4, 4)
    left, right = (torch.linalg.qr(torch.randn(d, 4)).Q for d in (6, 5))
    grad = torch.einsum("abc,ia,jb->ijc", core, left, right)
    step_with(optimizer, p, grad)
    torch.testing.assert_close(p.detach(), -grad, rtol=1e-4, atol=1e-4)
    assert set(optimizer.state[p]) == {
        *("step", "seed", "waiting", "left", "rank", "basis.0", "basis.1", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("refresh", ["svd", "power"])
def test_an_expert_without_a_gradient_keeps_all_its_bases(refresh: str) -> None:
    p = nn.Parameter(torch.zeros(2, 12, 10))
    optimizer = GaLoreAdamW([p], rank=4, proj_type="full", update_proj_gap=1, refresh=refresh)
    p.grad = torch.randn(2, 12, 10)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items() if key.startswith("basis")}
    p.grad = torch.randn(2, 12, 10)
    p.grad[1] = 0
    optimizer.step()
    assert len(before) == 2
    for key, basis in before.items():
        assert torch.equal(optimizer.state[p][key][1], basis[1]) and not torch.equal(
            optimizer.state[p][key][0], basis[0]
        )


def test_a_state_of_another_side_is_refused() -> None:
    optimizer = GaLoreAdamW([p := nn.Parameter(torch.zeros(12, 10))], rank=4, proj_type="full")
    p.grad = torch.randn(12, 10)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["left"] = True
    with pytest.raises(ValueError, match="'left' of parameter 0 is True, expected False"):
        optimizer.load_state_dict(saved)


def test_convolutions_compress_their_channels_only() -> None:
    p = nn.Parameter(torch.zeros(16, 12, 3, 3))
    optimizer = GaLoreAdamW([p], rank=4)
    step_with(optimizer, p, torch.randn(16, 12, 3, 3))
    assert optimizer.state[p]["exp_avg"].shape == (4, 4, 3, 3)
    assert "basis.2" not in optimizer.state[p]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1, 3], ids=["first", "between", "refresh"])
@pytest.mark.parametrize("refresh", ["svd", "randomized", "power"])
def test_a_non_finite_gradient_is_skipped_and_said_once(bad: float, at: int, refresh: str) -> None:
    p, q = (nn.Parameter(torch.ones(8, 6)) for _ in range(2))
    bias = nn.Parameter(torch.ones(5))
    optimizer = GaLoreAdamW([p, bias], rank=2, update_proj_gap=3, refresh=refresh)
    clean = GaLoreAdamW([q], rank=2, update_proj_gap=3, refresh=refresh)
    grads = [torch.randn(8, 6) for _ in range(6)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, grad in enumerate(grads):
            if i == at:
                for _ in range(2):
                    poisoned = grad.clone()
                    poisoned[3, 2] = bad
                    p.grad, bias.grad = poisoned, torch.full((5,), bad)
                    optimizer.step()
            p.grad, bias.grad = grad, torch.ones(5)
            optimizer.step()
            step_with(clean, q, grad)
    assert torch.equal(p, q)
    assert bool(bias.isfinite().all()) and bool((bias < 1).all())
    assert [str(w.message) for w in caught if "non-finite" in str(w.message)] == [
        "GaLoreAdamW skipped an update because of a non-finite gradient (warned once)"
    ]


def test_a_failing_svd_falls_back_and_a_hopeless_one_keeps_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, refresh="svd")
    monkeypatch.setattr(torch.linalg, "svd", fail)
    u, s, v = torch.randn(8, 2), torch.tensor([3.0, 2.0]), torch.linalg.qr(torch.randn(6, 2)).Q
    step_with(optimizer, p, (u * s) @ v.mT)
    assert overlap(v, optimizer.state[p]["basis"]) > 0.999

    step_with(optimizer, p, torch.randn(8, 6))
    old = optimizer.state[p]["basis"].clone()
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = p.detach().clone()
    with pytest.warns(RuntimeWarning, match="kept an old basis"):
        step_with(optimizer, p, torch.randn(8, 6))
    assert torch.equal(old, optimizer.state[p]["basis"])
    assert not torch.equal(before, p) and bool(p.isfinite().all())


def test_a_zero_gradient_sets_no_basis() -> None:
    p = nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW([p], rank=2, refresh="svd")
    for _ in range(2):
        step_with(optimizer, p, torch.zeros(8, 6))
        assert torch.equal(p, torch.ones(8, 6)) and not optimizer.state[p]["basis"].any()
    grad = torch.randn(8, 6)
    step_with(optimizer, p, grad)
    torch.testing.assert_close(optimizer.state[p]["basis"], torch.linalg.svd(grad).Vh[:2].mT)
    # As in torch.optim, the updates with a zero gradient count.
    assert optimizer.state[p]["step"] == 3


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 13),
    rank=st.integers(1, 14),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    proj_type=st.sampled_from(["std", "reverse_std", "left", "right", "full"]),
    refresh=st.sampled_from(["svd", "randomized", "power"]),
    contiguous=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*compresses no parameter")
def test_any_matrix_trains(
    rows: int, columns: int, rank: int, dtype: torch.dtype, proj_type: str, refresh: str, contiguous: bool
) -> None:
    weight = torch.ones(rows, columns, dtype=dtype) if contiguous else torch.ones(columns, rows, dtype=dtype).T
    p = nn.Parameter(weight)
    # Farther from every weight than eight updates go, which would step over a target nearby.
    away = torch.randn(rows, columns)
    target = 1 + away + 0.5 * away.sign()
    optimizer = GaLoreAdamW([p], lr=0.05, rank=rank, update_proj_gap=2, scale=1.0, proj_type=proj_type, refresh=refresh)
    first = float((p.detach().float() - target).square().sum())
    for _ in range(8):
        step_with(optimizer, p, (p.detach().float() - target).to(dtype))
    assert float((p.detach().float() - target).square().sum()) < first
    compressed = rank < min(rows, columns)
    assert any(key.startswith("basis") for key in optimizer.state[p]) == compressed
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_randomness_comes_from_the_position_alone() -> None:
    def basis_of(draws_before: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(30, 20))
        optimizer = GaLoreAdamW([nn.Parameter(torch.zeros(3)), p], rank=4)
        torch.manual_seed(draws_before)
        torch.rand(draws_before)
        step_with(optimizer, p, torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
        return optimizer.state[p]["basis"]

    assert torch.equal(basis_of(1), basis_of(7))


def test_state_works_on_the_meta_device() -> None:
    shapes = [(64, 32), (32, 64), (16, 12, 3, 3), (7,)]
    meta = [nn.Parameter(torch.empty(s, device="meta", dtype=torch.bfloat16)) for s in shapes]
    real = [nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes]
    planned, stepped = (GaLoreAdamW(params, rank=8) for params in (meta, real))
    for p, q in zip(meta, real):
        step_with(stepped, q, torch.randn(q.shape).bfloat16())
        state = planned.init_state(p, planned.param_groups[0])
        tensors = {k: (v.shape, v.dtype) for k, v in state.items() if isinstance(v, torch.Tensor)}
        assert tensors == {k: (v.shape, v.dtype) for k, v in stepped.state[q].items() if isinstance(v, torch.Tensor)}
        assert all(v.is_meta for v in state.values() if isinstance(v, torch.Tensor))


def test_spectral_selection_draws_half_uniformly_half_by_singular_value() -> None:
    values = torch.tensor([6.0, 2.0, 1.0, 1.0, 0.0])
    draws = [draw_spectral(values, 1, torch.Generator().manual_seed(seed)) for seed in range(4000)]
    frequency = torch.cat(draws).bincount(minlength=5) / 4000
    # Four standard deviations of the largest, sqrt(0.4 * 0.6 / 4000).
    torch.testing.assert_close(frequency, 0.5 / 5 + 0.5 * values / 10, rtol=0, atol=0.031)
    several = draw_spectral(values, 4, torch.Generator().manual_seed(0))
    assert several.tolist() == sorted(set(several.tolist()))


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)], ids=str)
def test_spectral_selection_takes_singular_vectors_by_position_and_step(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape)
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizer = GaLoreAdamW(params, rank=5, update_proj_gap=1, refresh="svd", selection="spectral")
    exact = torch.linalg.svd(grad.mT if shape[0] < shape[1] else grad).Vh.mT
    drawn: list[tuple[int, ...]] = []
    for _ in range(3):
        for p in params:
            p.grad = grad
        optimizer.step()
        for p in params:
            cosines = (exact[:, :20].mT @ optimizer.state[p]["basis"]).abs()
            torch.testing.assert_close(cosines.amax(0), torch.ones(5), atol=1e-4, rtol=0)
            drawn.append(tuple(cosines.argmax(0).tolist()))
    assert len(set(drawn)) == 6 and all(list(d) == sorted(set(d)) for d in drawn)


@pytest.mark.parametrize("refresh", ["power", "randomized"])
def test_spectral_selection_needs_every_singular_value(refresh: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid refresh: '{refresh}', selection='spectral' works with 'svd' only"):
        GaLoreAdamW([nn.Parameter(torch.zeros(9, 9))], rank=2, refresh=refresh, selection="spectral")
    with pytest.raises(ValueError, match="Invalid selection: 'random', expected one of 'top', 'spectral'"):
        GaLoreAdamW([nn.Parameter(torch.zeros(9, 9))], rank=2, selection="random")
