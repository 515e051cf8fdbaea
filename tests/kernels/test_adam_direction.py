"""The kernel against fp64, relative to the error of the eager operation."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim import GaLoreAdamW
from lowrank_optim.ops import pick
from lowrank_optim.ops.adam_direction import adam_direction as eager

BETAS_EPS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (1025,), (5461, 3), (64, 32), (3, 5, 7), (0, 4)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_adam_direction(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    grad = torch.randn(shape, device=device).to(dtype)
    if transposed:
        grad = grad.T.contiguous().T if grad.ndim == 2 else grad
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
    with pytest.raises(ValueError, match="expected contiguous"):
        kernel(half, half, half, **BETAS_EPS)


def test_a_whole_optimizer_is_the_same_on_both_backends(device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(12, 7, device=device)) for _ in range(2)]
    optimizers = [GaLoreAdamW([p], rank=3, backend=b) for p, b in zip(params, ("eager", "triton"))]
    for _ in range(4):
        grad = torch.randn(12, 7, device=device)
        for p, optimizer in zip(params, optimizers):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-7)
