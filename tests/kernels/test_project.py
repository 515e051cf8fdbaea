"""The kernel against fp64, relative to the error of the eager operation."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import pick
from lowrank_optim.ops.project import project as eager

SHAPES = [(61, 37, 5), (1, 40, 3), (130, 2, 1), (64, 64, 16), (70, 150, 140), (0, 8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype, turned: bool, device: torch.device) -> None:
    rows, d, rank = shape
    grad, basis = torch.randn(rows, d, device=device).to(dtype), torch.randn(d, rank, device=device).to(dtype)
    grad = grad.T.contiguous().T if turned else grad
    ours, theirs = pick(eager, "triton", device)(grad, basis), eager(grad, basis)
    for a, b, exact in zip(ours, theirs, eager(grad.double(), basis.double())):
        assert a.dtype == torch.float32 and a.shape == exact.shape
        error = (b.double() - exact).norm()
        assert (a.double() - exact).norm() <= 2 * error + 1e-6 * exact.norm()


def test_a_non_finite_gradient_shows_in_both(device: torch.device) -> None:
    grad, basis = torch.ones(40, 20, device=device), torch.ones(20, 3, device=device)
    grad[7, 5] = float("nan")
    low, norms = pick(eager, "triton", device)(grad, basis)
    for result in (low, norms):
        assert result.isfinite().all(dim=1).nonzero().numel() == 39 and bool(result[7].isnan().all())


def test_other_dtypes_are_refused(device: torch.device) -> None:
    double = torch.ones(4, 4, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="Invalid grad: torch"):
        pick(eager, "triton", device)(double, double)
