"""What is particular to Alice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import Alice, GaLoreAdamW
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.reference.alice import alice
from tests.temporaries import CountTemporaries

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "rank": 3}


def trained(optimizer: LowRankOptimizer, p: nn.Parameter, grads: Tensor) -> Tensor:
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize(("beta3", "gamma"), [(0.9, 1.01), (0.0, None), (0.9, None)])
def test_the_formulas_of_the_paper(shape: tuple[int, int], beta3: float, gamma: float | None) -> None:
    weight, *grads = torch.randn(13, *shape, dtype=torch.float64)
    options: dict[str, Any] = {"beta3": beta3, "scale": 0.3, "compensation": 0.7}
    tall = shape[0] > shape[1]
    turned = [t.T if tall else t for t in (weight, *grads)]
    expected = alice(turned[0], turned[1:], gap=4, gamma=gamma, **options, **SETTINGS)[-1]
    p = nn.Parameter(weight.clone())
    optimizer = Alice([p], leading=None, update_proj_gap=4, start="svd", limiter_gamma=gamma, **options, **SETTINGS)
    torch.testing.assert_close(
        trained(optimizer, p, torch.stack(grads)), expected.T if tall else expected, rtol=0, atol=1e-10
    )


def test_without_compensation_and_memory_it_is_galore_without_bias_correction() -> None:
    """Over the first basis; GaLore's weight is bias-corrected, by a number."""
    grad = torch.randn(1, 14, 9)
    options: dict[str, Any] = {"betas": (0.9, 0.9), "eps": 0.0, "rank": 3, "lr": 1.0, "scale": 1.0}
    params = [nn.Parameter(torch.zeros(14, 9)) for _ in range(2)]
    moved = trained(
        Alice([params[0]], leading=None, beta3=0.0, compensation=0.0, start="svd", **options), params[0], grad
    )
    galore = trained(GaLoreAdamW([params[1]], refresh="svd", **options), params[1], grad)
    torch.testing.assert_close(moved * 0.1**0.5 / 0.1, galore, rtol=1e-4, atol=1e-4)


def bases(optimizer: Alice, p: nn.Parameter, grads: Tensor) -> list[Tensor]:
    found = []
    for grad in grads:
        trained(optimizer, p, grad.unsqueeze(0))
        found.append(optimizer.state[p]["basis"].clone())
    return found


@pytest.mark.parametrize(("rank", "leading"), [(4, 2), (7, 2)])
def test_random_directions_stand_beside_the_leading_ones(rank: int, leading: int) -> None:
    p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
    optimizer = Alice([p], rank=rank, leading=leading, update_proj_gap=1, start="svd", beta3=0.0)
    # Of rank 2, so that the leading directions are the gradient's own.
    grads = (torch.randn(14, 2) @ torch.randn(2, 9)).double().expand(4, 14, 9)
    found = bases(optimizer, p, grads)
    top = torch.linalg.svd(grads[0]).Vh[:leading].mT
    for basis in found:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64))
        share = (top.mT @ basis[:, :leading]).square().sum()
        assert float(share) == pytest.approx(leading)
    drawn = [basis[:, leading:] for basis in found]
    assert all(float((a.mT @ b).square().sum()) < rank - leading - 0.01 for a, b in pairwise(drawn))


def test_a_basis_stays_orthonormal_and_follows_the_mean_covariance() -> None:
    p = nn.Parameter(torch.zeros(40, 12))
    optimizer = Alice([p], rank=3, leading=None, update_proj_gap=5, beta3=0.99)
    spread = torch.diag(torch.cat((torch.tensor([9.0, 8.0, 7.0]), torch.ones(9))))
    for _ in range(100):
        trained(optimizer, p, torch.randn(1, 40, 12) @ spread)
    basis = optimizer.state[p]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), rtol=0, atol=1e-5)
    assert float(basis[:3].square().sum()) > 2.9


def test_a_rotation_of_the_compressed_side_turns_the_update_along() -> None:
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    grads = torch.randn(9, 14, 9, dtype=torch.float64)
    params = [nn.Parameter(torch.zeros(14, 9, dtype=torch.float64)) for _ in range(2)]
    options: dict[str, Any] = {"rank": 3, "leading": None, "update_proj_gap": 4, "start": "svd"}
    plain, turned = (trained(Alice([p], **options), p, g) for p, g in zip(params, (grads, grads @ turn)))
    torch.testing.assert_close(plain @ turn, turned, rtol=1e-6, atol=1e-8)


def test_the_compensation_has_rows_of_one_norm_where_it_has_no_memory() -> None:
    p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
    optimizer = Alice([p], lr=1.0, rank=3, betas=(0.0, 0.0), scale=1.0, compensation=1.0, leading=None)
    moved = -trained(optimizer, p, torch.randn(1, 14, 9, dtype=torch.float64))
    basis = optimizer.state[p]["basis"]
    outside = moved - moved @ basis @ basis.mT
    torch.testing.assert_close(outside.norm(dim=1), torch.full((14,), 6.0, dtype=torch.float64).sqrt())
    torch.testing.assert_close(optimizer.state[p]["update_norm"], outside.norm())


def test_a_gradient_inside_of_the_subspace_leaves_nothing_to_compensate() -> None:
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = Alice([p], rank=3)
    trained(optimizer, p, (torch.randn(14, 2) @ torch.randn(2, 9)).expand(3, 14, 9))
    assert float(optimizer.state[p]["update_norm"]) == 0
    assert float(p.detach().abs().max()) < 1


def test_the_state_is_that_of_the_paper() -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    optimizer = Alice([p], rank=4)
    state = optimizer.init_state(p, optimizer.param_groups[0])
    elements = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    assert elements == 2 * 64 * 4 + 32 * 4 + 64 + 4 * 4 + 1
    assert "covariance" not in Alice([p], rank=4, beta3=0.0).init_state(p, {**optimizer.param_groups[0], "beta3": 0.0})


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_between_refreshes_nothing_of_the_size_of_the_weight_is_made(shape: tuple[int, int], device: str) -> None:
    p = nn.Parameter(torch.ones(shape, device=device))
    optimizer = Alice([p], rank=8, weight_decay=0.1)
    p.grad = torch.randn(shape, device=device)
    optimizer.init_state(p, optimizer.param_groups[0])["step"] = 1
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    assert count.created == []


def test_vectors_have_betas_of_their_own() -> None:
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [
        Alice([params[0], nn.Parameter(torch.ones(9, 9))], rank=3, adamw_lr=None, weight_decay=0.1),
        torch.optim.AdamW([params[1]], lr=0.02, weight_decay=0.1),
    ]
    for _ in range(4):
        grad = torch.randn(5)
        for p, optimizer in zip(params, optimizers):
            p.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"leading": 0}, "Invalid leading: 0, expected a positive int or None"),
        ({"beta3": 1.0}, r"Invalid beta3: 1.0, expected a number in \[0, 1\)"),
        ({"compensation": -1.0}, "Invalid compensation: -1.0"),
        ({"adamw_betas": (0.9, 1.0)}, r"Invalid adamw_betas\[1\]: 1.0"),
        ({"start": "power"}, "Invalid start: 'power', expected one of 'randomized', 'svd'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alice([nn.Parameter(torch.ones(8, 8))], rank=2, **kwargs)


def test_a_covariance_that_overflows_leaves_the_basis() -> None:
    p = nn.Parameter(torch.zeros(200, 9))
    optimizer = Alice([p], rank=3, leading=2, update_proj_gap=2)
    # Rows whose squares are finite, and their sum is not.
    for size in (3e18, 1.0, 1.0, 1.0):
        p.grad = torch.randn(200, 9) * size
        optimizer.step()
    assert not optimizer.state[p]["covariance"].isfinite().all()
    assert optimizer.state[p]["basis"].isfinite().all() and p.isfinite().all()


def test_rows_without_a_residual_stay_finite_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = Alice([p], rank=3, leading=None, update_proj_gap=100)
    inside = torch.zeros(14, 9)
    inside[:, :2] = torch.randn(14, 2)
    bad = torch.randn(14, 9)
    bad[2, 3] = torch.nan
    trained(optimizer, p, torch.stack((inside, bad, torch.randn(14, 9))))
    assert p.isfinite().all() and all(
        bool(v.isfinite().all()) for v in optimizer.state[p].values() if torch.is_tensor(v)
    )
