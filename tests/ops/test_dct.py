"""The cosine transforms, against the definition and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_optim.ops.dct import add_dct2_, add_dct3_, dct_matrix

SIZES = [1, 2, 3, 4, 7, 64, 97, 255, 256]


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_the_definition_and_orthogonal(size: int) -> None:
    matrix = dct_matrix(size)
    for f, j in [(0, 0), (size // 2, size - 1), (size - 1, size // 3)]:
        expected = math.sqrt((1 if f == 0 else 2) / size) * math.cos(math.pi * f * (2 * j + 1) / (2 * size))
        assert float(matrix[f, j]) == pytest.approx(expected, abs=1e-13)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_large_matrix_is_exact() -> None:
    """In fp32 the phase of the last rows is off by 1e-3."""
    matrix = dct_matrix(4096)
    for f, j in [(4095, 4095), (4094, 4000), (3001, 4093)]:
        # A phase of 1e7 loses 1e-9 in fp64 as well: reduce it as an integer first.
        expected = math.sqrt(2 / 4096) * math.cos(math.pi * (f * (2 * j + 1) % (4 * 4096)) / (2 * 4096))
        assert float(matrix[f, j]) == pytest.approx(expected, abs=1e-15)
    some = matrix[torch.randperm(4096)[:48]]
    torch.testing.assert_close(some @ some.mT, torch.eye(48, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.complex128, 1e-13)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_fft_equals_the_product(size: int, dtype: torch.dtype, atol: float, transposed: bool) -> None:
    x = torch.randn(size, 5, dtype=dtype).mT if transposed else torch.randn(5, size, dtype=dtype)
    matrix = dct_matrix(size).to(dtype)
    for add_, expected in ((add_dct2_, x @ matrix.mT), (add_dct3_, x @ matrix)):
        start = torch.randn(5, size, dtype=dtype)
        result = start.clone()
        add_(result, x)
        torch.testing.assert_close(result, start + expected, atol=atol, rtol=0)


def test_a_narrow_input_is_transformed_in_the_type_of_the_result() -> None:
    x = torch.randn(5, 12).bfloat16()
    result = torch.zeros(5, 12)
    add_dct2_(result, x)
    torch.testing.assert_close(result, x.float() @ dct_matrix(12).float().mT, atol=1e-6, rtol=0)
