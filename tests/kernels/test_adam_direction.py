"""The kernel against fp64, relative to the error of the eager operation."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam_direction import adam_direction as eager
from tests.conformance import nightly

BETAS_EPS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (1025,), (64, 32), (3, 5, 7), (0, 4))
LONG = [((5461, 3), dtype, transposed) for dtype in DTYPES for transposed in (False, True)]


@pytest.mark.parametrize(
    ("shape", "dtype", "transposed"),
    [
        *((shape, dtype, False) for shape in SHAPES for dtype in DTYPES),
        *(((64, 32), dtype, True) for dtype in DTYPES),
        LONG[3],
        *nightly(*LONG[:3], *LONG[4:]),
    ],
    ids=str,
)
def test_adam_direction(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    grad = torch.randn(shape, device=device).to(dtype)
    if transposed:
        grad = grad.T.contiguous().T
    moments = [torch.zeros(shape, device=device) for _ in range(4)]
    exact = [torch.zeros(shape, device=device, dtype=torch.float64) for _ in range(2)]
    for _ in range(3):
        n_kernel = kernel(grad, moments[0], moments[1], **BETAS_EPS)
        n_eager = eager(grad, moments[2], moments[3], **BETAS_EPS)
        n_exact = eager(grad, exact[0], exact[1], **BETAS_EPS)
    assert n_kernel.dtype == torch.float32 and n_kernel.shape == shape
    for ours, theirs, truth in zip((n_kernel, *moments[:2]), (n_eager, *moments[2:]), (n_exact, *exact)):
        error = (ours.double() - truth).abs().sum()
        # Both round a handful of fp32 operations; a factor of 2 is room for another order of them.
        assert error <= 2 * (theirs.double() - truth).abs().sum() + 1e-6 * truth.abs().sum()


def test_moments_of_another_dtype_are_refused(device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    half = torch.zeros(4, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="Invalid exp_avg: "):
        kernel(half, half, half, **BETAS_EPS)


@pytest.mark.parametrize("on_device", [False, True])
def test_bfloat16_moments_are_rounded_as_in_the_eager_operation(on_device: bool, device: torch.device) -> None:
    """With betas of 0 the moments are R and R², the same bits before they are rounded."""
    grad = torch.randn(41, 30, device=device)
    keys = (5, -6)
    results = []
    for operation in (eager, pick(eager, "triton", device)):
        moments = [torch.zeros(41, 30, dtype=torch.bfloat16, device=device) for _ in range(2)]
        words = tuple(torch.tensor(k, dtype=torch.int32, device=device) if on_device else k for k in keys)
        eps = torch.tensor(1e-6, device=device) if on_device else 1e-6
        results.append([operation(grad, *moments, beta1=0.0, beta2=0.0, eps=eps, keys=words, start=77), *moments])
    (direction, *theirs), (our_direction, *ours) = results
    torch.testing.assert_close(our_direction, direction, rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not torch.equal(ours[0], grad.bfloat16())


@pytest.mark.parametrize("shape", [(41, 30), (3, 700), (1100, 1), (5, 256)], ids=str)
def test_norms_of_rows(shape: tuple[int, int], device: torch.device) -> None:
    grad = torch.randn(shape, device=device)
    norms = torch.empty(2, shape[0], device=device)
    moments = [torch.zeros(shape, device=device) for _ in range(2)]
    direction = pick(eager, "triton", device)(grad, *moments, **BETAS_EPS, norms=norms)
    torch.testing.assert_close(norms, torch.stack([grad.norm(dim=1), direction.norm(dim=1)]))
    theirs = torch.empty(2, shape[0], device=device)
    eager(grad, *(torch.zeros(shape, device=device) for _ in range(2)), **BETAS_EPS, norms=theirs)
    torch.testing.assert_close(norms, theirs)
