"""A batch gives, matrix by matrix, what single calls give."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowrank_optim.ops.adafactor_direction import clip_rms_
from lowrank_optim.ops.chunks import as_batch, row_blocks
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.orthonormal import orthonormalize, range_finder, subspace_iteration
from tests.ops.batches import Call, eager_only, with_kernels

CPU = torch.device("cpu")
BATCHES = [(3,), (1,), (2, 2)]


def check_batch(call: Call, batch: tuple[int, ...]) -> None:
    together = call.results()
    assert together
    for index in product(*map(range, batch)):
        for all_of_them, alone in zip(together, call.of(index).results(), strict=True):
            assert all_of_them.dtype == alone.dtype
            torch.testing.assert_close(all_of_them[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", sorted(with_kernels((), CPU, torch.float32)))
def test_operations_with_kernels(name: str, batch: tuple[int, ...]) -> None:
    check_batch(with_kernels(batch, CPU, torch.float32)[name], batch)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", sorted(eager_only(())))
def test_the_others(name: str, batch: tuple[int, ...]) -> None:
    check_batch(eager_only(batch)[name], batch)


@pytest.mark.parametrize("shape", [(37, 61), (3, 7), (1, 1)], ids=str)
def test_every_matrix_of_a_draw_is_that_of_its_number(shape: tuple[int, int]) -> None:
    def draw(**which: object) -> torch.Tensor:
        return gaussian(*shape, key=5, dtype=torch.float64, device=CPU, **which)  # type: ignore[arg-type]

    together = draw(batch=(2, 3))
    assert together.shape == (2, 3, *shape)
    for i in range(6):
        torch.testing.assert_close(together.flatten(0, 1)[i], draw(first=i))
    torch.testing.assert_close(together[0, 0], draw())
    # No number is met twice.
    assert together.unique().numel() == together.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_every_matrix_of_a_batch_takes_its_own_way_to_a_basis(dtype: torch.dtype) -> None:
    """One Cholesky factorisation, two, reflections, and no basis at all, side by side."""
    left, right = (torch.linalg.qr(torch.randn(n, 7, dtype=dtype)).Q for n in (40, 7))
    stack = [(left * torch.logspace(0, -decades, 7)) @ right for decades in (0, 2, 6)]
    stack += [torch.zeros(40, 7, dtype=dtype), torch.full((40, 7), float("nan"), dtype=dtype)]
    bases = orthonormalize(torch.stack(stack))
    for basis in bases[:4]:
        torch.testing.assert_close(basis.mH @ basis, torch.eye(7, dtype=dtype), atol=1e-5, rtol=0)
    # A small condition determines the columns.
    for basis, matrix in zip(bases[:2], stack[:2]):
        torch.testing.assert_close(basis, orthonormalize(matrix), atol=1e-4, rtol=0)
    assert not bool(bases[4].isfinite().all())


def test_one_bad_gradient_does_not_change_the_bases_of_the_others() -> None:
    stack = torch.randn(4, 30, 12)
    stack[1], stack[3] = float("nan"), 1e20 * stack[3]
    start = torch.randn(4, 12, 3)
    for found, alone in (
        (subspace_iteration(stack, start), lambda i: subspace_iteration(stack[i], start[i])),
        (
            range_finder(stack, 12, torch.Generator().manual_seed(0)),
            lambda i: range_finder(stack[i], 12, torch.Generator().manual_seed(0)),
        ),
    ):
        assert not bool(found[1].isfinite().any())
        for i in (0, 2, 3):
            # Up to the signs of eigenvectors.
            turned = found[i].mT @ alone(i)
            torch.testing.assert_close(turned.abs(), torch.eye(turned.shape[0]), atol=1e-3, rtol=0)


def test_clipping_together_or_each_for_itself() -> None:
    direction = torch.stack([torch.full((3, 5), 4.0), torch.full((3, 5), 0.5)])
    each = clip_rms_(direction.clone(), 1.0, per_matrix=True)
    torch.testing.assert_close(each, torch.stack([torch.ones(3, 5), torch.full((3, 5), 0.5)]))
    together = clip_rms_(direction.clone(), 1.0)
    torch.testing.assert_close(together.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(together[0], 8 * together[1])


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 7, 5), (9, 2, 3), (1, 1, 40), (2, 0, 3), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("size", [1, 12, 40, 1000])
def test_blocks_cover_every_row_once(shape: tuple[int, int, int], size: int) -> None:
    seen = torch.zeros(shape)
    for matrices, rows in row_blocks(seen, size):
        part = seen[matrices, rows]
        assert part.is_contiguous() and part.numel() <= max(size, shape[2])
        part.add_(1)
    assert bool((seen == 1).all())


def test_leading_axes_without_a_common_stride_are_no_batch() -> None:
    tensor = torch.zeros(2, 3, 4, 5)
    assert as_batch("x", tensor.mT).shape == (6, 5, 4)
    with pytest.raises(ValueError, match="Invalid x: shape \\(3, 2, 4, 5\\) with strides"):
        as_batch("x", tensor.transpose(0, 1))
    with pytest.raises(ValueError, match="Invalid x: shape \\(4,\\)"):
        as_batch("x", torch.zeros(4))
