from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.orthonormal import orthonormalize, orthonormalize_blind, range_finder, subspace_iteration


def energy(a: torch.Tensor, basis: torch.Tensor) -> float:
    return float((a @ basis).square().sum() / a.square().sum())


def off(basis: torch.Tensor) -> float:
    """Largest deviation of the Gram matrix from the identity."""
    wide = basis.to(torch.promote_types(basis.dtype, torch.float64))
    return float((wide.mH @ wide - torch.eye(basis.shape[1])).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("decades", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", [(300, 40), (41, 40), (9, 1), (7, 7)], ids=str)
def test_any_condition_gives_the_q_of_a_positive_diagonal(
    shape: tuple[int, int], decades: int, dtype: torch.dtype
) -> None:
    """By one Cholesky factorisation, by two and by reflections."""
    d, rank = shape
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=dtype)).Q for n in (d, rank))
    matrix = (left * torch.logspace(0, -decades, rank)) @ right
    basis = orthonormalize(matrix)
    eps = torch.finfo(dtype).eps
    assert off(basis) < 16 * eps
    upper = basis.mH @ matrix
    assert float(upper.tril(-1).abs().max()) < 64 * eps
    diagonal = upper.diagonal()
    # Of a nearly dependent column the sign is rounding.
    assert bool((diagonal.real > -64 * eps).all())
    if 10.0**decades < 0.01 / eps:
        exact, factor = torch.linalg.qr(matrix.to(torch.complex128 if dtype.is_complex else torch.float64))
        signs = factor.diagonal().sgn()
        torch.testing.assert_close(basis, (exact * signs).to(dtype), atol=64 * eps * 10.0**decades, rtol=0)


def test_degenerate_matrices_have_a_basis() -> None:
    for matrix in (torch.zeros(9, 4), torch.ones(9, 4), torch.eye(9, 4) * torch.tensor([1e-30, 1.0, 1e18, 0.0])):
        assert off(orthonormalize(matrix)) < 1e-6
    for magnitude in (1e-20, 1e20):
        a = magnitude * torch.randn(30, 12)
        assert off(subspace_iteration(a, torch.eye(12, 5))) < 1e-6
    assert not bool(orthonormalize(torch.full((9, 4), float("nan"))).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_rounding_turns_no_direction_around(dtype: torch.dtype) -> None:
    for seed in range(20):
        a = torch.randn(30, 20, dtype=dtype) * torch.logspace(0, -1, 20)
        near = a * (1 + 1e-7 * torch.randn(30, 20))
        one, other = (range_finder(m, 4, torch.Generator().manual_seed(seed)) for m in (a, near))
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_a_basis_that_follows_a_thousand_gradients_stays_orthonormal() -> None:
    start = torch.randn(48, 24)
    basis = range_finder(start, 6, torch.Generator().manual_seed(0))
    worst = 0.0
    for _ in range(1000):
        start = 0.95 * start + 0.3 * torch.randn(48, 24)
        basis = subspace_iteration(start, basis)
        worst = max(worst, off(basis))
    assert worst < 1e-6
    # As close to the dominant subspace as one iteration gets while the matrix moves.
    best = energy(start, torch.linalg.svd(start, full_matrices=False).Vh[:6].mT)
    assert energy(start, basis) > 0.8 * best


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(9, 4), (2, 9, 4)], ids=str)
def test_without_a_look_it_is_the_same_factor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype)
    basis, good = orthonormalize_blind(matrix)
    assert good.shape == (*shape[:-2], 1, 1) and good.all()
    torch.testing.assert_close(basis, orthonormalize(matrix), rtol=1e-4, atol=1e-5)
    for bad in (torch.nan, torch.inf):
        broken = matrix.clone()
        broken.view(-1)[1] = bad
        good = orthonormalize_blind(broken)[1]
        assert not good.view(-1)[0] and good.view(-1)[1:].all()
