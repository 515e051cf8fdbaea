from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops.adafactor_direction import adafactor_direction, clip_rms_, root_mean_square, square_of
from lowrank_optim.ops.adam_direction import adam_direction


def by_definition(low: Tensor, row: Tensor, col: Tensor, weight: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    square = low.abs() ** 2 + eps
    row, col = (1 - weight) * row + weight * square.mean(-1), (1 - weight) * col + weight * square.mean(-2)
    second = row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
    return low / second.sqrt(), row, col


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_direction(shape: tuple[int, ...], dtype: torch.dtype, per_matrix: bool) -> None:
    # Matrices of different lengths.
    low = torch.randn(shape, dtype=dtype) * torch.arange(1.0, 1 + shape[0]).view(-1, *[1] * (len(shape) - 1))
    row, col = torch.rand(*shape[:-1], dtype=torch.float64), torch.rand(*shape[:-2], shape[-1], dtype=torch.float64)
    expected, new_row, new_col = by_definition(low, row, col, 0.3, 1e-30)
    axes = (-2, -1) if per_matrix else None
    rms = (expected.abs() ** 2).mean(axes, keepdim=per_matrix).sqrt()
    found = adafactor_direction(low, row, col, weight=0.3, eps=1e-30, clip_threshold=0.5, per_matrix=per_matrix)
    torch.testing.assert_close(found, expected / (rms / 0.5).clamp(min=1.0), rtol=1e-10, atol=0)
    torch.testing.assert_close((row, col), (new_row, new_col), rtol=1e-10, atol=0)


def test_what_is_short_is_not_lengthened() -> None:
    assert torch.equal(clip_rms_(torch.full((2, 3), 0.1), 1.0), torch.full((2, 3), 0.1))
    assert clip_rms_(torch.full((2, 3), 4.0), 1.0).eq(1).all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_root_mean_square_is_wide(dtype: torch.dtype) -> None:
    # The sum of squares overflows in float16.
    found = root_mean_square(torch.full((3, 8, 8), 300.0, dtype=dtype))
    assert found.shape == () and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx(300, rel=1e-5)
    tall = torch.ones(3, 4, 5, dtype=dtype) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).to(dtype)
    each = root_mean_square(tall, per_matrix=True)
    assert each.shape == (3, 1, 1) and each.flatten().tolist() == pytest.approx([1, 2, 3], rel=1e-5)


def test_a_square_is_of_the_magnitude() -> None:
    assert square_of(torch.tensor([3.0, -2.0])).tolist() == [9, 4]
    square = square_of(torch.tensor([3 + 4j, 2j]))
    assert square.tolist() == [25, 4] and not square.is_complex()


def test_second_moments_of_complex_gradients_are_of_the_magnitude() -> None:
    grad = torch.tensor([3 + 4j, 2j])
    first, second = torch.zeros(2, dtype=torch.complex64), torch.zeros(2)
    adam_direction(grad, first, second, beta1=0.0, beta2=0.0, eps=0.0)
    assert second.tolist() == [25, 4] and torch.equal(first, grad)
