"""The kernel that draws and measures against the eager function."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import pick
from lowrank_optim.ops.sketch import sketch as eager


@pytest.mark.parametrize("shape", [(1, 1), (37, 600), (5, 130), (3, 40, 33), (0, 4)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_the_eager_function(shape: tuple[int, ...], turned: bool, dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.randn(shape).to(device, dtype)
    grad = grad.mT if turned else grad
    key = torch.tensor(-7, dtype=torch.int32, device=device) if turned else -7
    basis, norms = pick(eager, "triton", device)(grad, 5, key=key, scale=0.5)
    expected, expected_norms = eager(grad, 5, key=key, scale=0.5)
    assert basis.dtype == dtype and norms.dtype == torch.float32
    rtol = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(basis, expected, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)


def test_a_row_that_is_not_finite_has_no_finite_norm(device: torch.device) -> None:
    grad = torch.ones(9, 700, device=device)
    grad[3, 650], grad[5, 0] = torch.nan, torch.inf
    _, norms = pick(eager, "triton", device)(grad, 2, key=0, scale=1.0)
    assert norms.isfinite().view(-1).tolist() == [i not in (3, 5) for i in range(9)]


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    with pytest.raises(ValueError, match="Invalid grad: "):
        kernel(torch.ones(4, 3, dtype=torch.float64, device=device), 2, key=0, scale=1.0)
    with pytest.raises(ValueError, match="expected fewer than 2\\^31 - 1024 elements"):
        kernel(torch.ones(1, 2**16, device=device), 2**15, key=0, scale=1.0)
