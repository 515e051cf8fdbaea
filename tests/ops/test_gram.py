from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.gram import gram


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(5461, 3), (7, 9), (0, 4), (1, 1)], ids=str)
def test_gram(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    square = torch.randn(shape[1], shape[1], dtype=dtype)
    torch.testing.assert_close(gram(x, alpha=0.3), 0.3 * x.mH @ x)
    torch.testing.assert_close(gram(x, square, alpha=0.3, beta=-2.0), 0.3 * x.mH @ x - 2 * square)
