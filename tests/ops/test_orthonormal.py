from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.orthonormal import range_finder, subspace_iteration


def energy(a: torch.Tensor, basis: torch.Tensor) -> float:
    return float((a @ basis).square().sum() / a.square().sum())


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (64, 64)], ids=str)
def test_range_finder_captures_what_the_svd_does(shape: tuple[int, int]) -> None:
    """On a slowly decaying spectrum with noise, as gradients have it, within 1 % of the optimum."""
    u, v = (torch.linalg.qr(torch.randn(d, min(shape))).Q for d in shape)
    a = (u * torch.arange(1, min(shape) + 1) ** -0.7) @ v.mT + 0.01 * torch.randn(shape)
    best = energy(a, torch.linalg.svd(a, full_matrices=False).Vh[:16].mT)
    basis = range_finder(a, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16), atol=1e-5, rtol=0)
    assert energy(a, basis) > 0.99 * best
    columns = (a @ basis).square().sum(0)
    assert bool((columns[:-1] >= 0.999 * columns[1:]).all())


def test_range_finder_takes_all_columns_and_a_zero_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for a in (torch.randn(9, 5), torch.zeros(9, 5)):
        basis = range_finder(a, 5, generator)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5), atol=1e-5, rtol=0)


def test_subspace_iteration_keeps_a_converged_basis_in_place() -> None:
    a = torch.randn(30, 12, dtype=torch.float64)
    v = torch.linalg.svd(a).Vh[:5].mT
    torch.testing.assert_close(subspace_iteration(a, v), v)


def test_subspace_iteration_converges_to_the_dominant_subspace() -> None:
    u, v = (torch.linalg.qr(torch.randn(d, 12, dtype=torch.float64)).Q for d in (30, 12))
    a = (u * 0.5 ** torch.arange(12)) @ v.mT
    basis = subspace_iteration(a, torch.randn(12, 4, dtype=torch.float64), iterations=25)
    torch.testing.assert_close(basis @ basis.mT, v[:, :4] @ v[:, :4].mT)
