from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops.factors import balance_factors, retracted_step


def draw(m: int, n: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    b = torch.randn(m, rank, generator=generator, dtype=dtype)
    return b, torch.randn(rank, n, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("m", "n", "rank"), [(24, 16, 4), (16, 24, 16), (7, 5, 1)])
def test_balanced_factors_have_the_product_and_equal_gram_matrices(m: int, n: int, rank: int) -> None:
    b, a = draw(m, n, rank)
    new_b, new_a = balance_factors(b, a)
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-12 * (b @ a).norm().item())
    gram = new_b.mT @ new_b
    torch.testing.assert_close(gram, new_a @ new_a.mT, rtol=0, atol=1e-11 * gram.norm().item())
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-11 * gram.norm().item())


def test_balancing_in_fp32_keeps_the_product() -> None:
    b, a = draw(96, 64, 16, torch.float32)
    new_b, new_a = balance_factors(b, a)
    assert (new_b @ new_a - b @ a).norm() < 1e-5 * (b @ a).norm()


def test_balancing_leaves_a_vanished_product_alone() -> None:
    _, a = draw(8, 6, 2)
    b = torch.zeros(8, 2, dtype=torch.float64)
    new_b, new_a = balance_factors(b, a)
    assert torch.equal(new_a, a) and torch.equal(new_b, b)


def test_balancing_keeps_lost_directions_trainable() -> None:
    b, a = draw(12, 10, 4)
    b[:, 1] = b[:, 0]
    a[1] = -a[0]
    new_b, new_a = balance_factors(b, a)
    torch.testing.assert_close(new_b @ new_a, b @ a)
    # dB = G Aᵀ: where a row of A vanishes together with its column of B, nothing moves any more.
    assert (new_a.norm(dim=1) > 0).all()


def test_balancing_takes_what_is_of_rounding_size_out_of_b() -> None:
    b, a = torch.eye(6, 3, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    b[1, 1] = 1e-20
    new_b, new_a = balance_factors(b, a)
    assert sorted(new_b.norm(dim=0).tolist()) == pytest.approx([0, 1, 1], abs=1e-15)
    assert new_a.norm(dim=1).min() > 1e-9


@pytest.mark.parametrize(("m", "n", "rank"), [(24, 16, 4), (13, 29, 5), (10, 12, 8), (9, 9, 9)])
def test_a_retracted_step_is_the_truncated_svd_of_the_tangent_step(m: int, n: int, rank: int) -> None:
    b, a = draw(m, n, rank)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q_b, q_a = torch.linalg.qr(b)[0], torch.linalg.qr(a.mT)[0]
    left, right = q_b @ q_b.mT, q_a @ q_a.mT
    tangent = left @ grad + grad @ right - left @ grad @ right
    u, s, vh = torch.linalg.svd(b @ a - 0.3 * tangent)
    expected = u[:, :rank] * s[:rank] @ vh[:rank]
    moved = retracted_step(b, a, grad @ a.mT, b.mT @ grad, 0.3)
    assert moved is not None
    assert (moved[0] @ moved[1] - expected).norm() < 1e-10 * expected.norm()
    torch.testing.assert_close(moved[0].mT @ moved[0], moved[1] @ moved[1].mT, rtol=0, atol=1e-9)


def test_a_retracted_step_needs_full_rank() -> None:
    b, a = draw(8, 6, 2)
    assert retracted_step(torch.zeros_like(b), a, torch.ones_like(b), torch.ones_like(a), 0.1) is None
