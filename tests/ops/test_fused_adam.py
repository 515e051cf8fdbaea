"""The fused kernel computes what the eager operation specifies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.fused_adam import fused_adam_, fused_adam_fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.0)])
@pytest.mark.parametrize("shape", [(1,), (7, 13), (64, 129)], ids=str)
def test_it_adds_the_direction(dtype: torch.dtype, betas: tuple[float, float], shape: tuple[int, ...]) -> None:
    constants = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-6}
    eager, fused = ([torch.zeros(shape, dtype=dtype) for _ in range(2)] for _ in range(2))
    for _ in range(4):
        grad, start = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        target = start.clone()
        expected = start - 0.3 * adam_direction(grad, *eager, **constants)
        fused_adam_(target, grad, *fused, **constants, alpha=-0.3)
        torch.testing.assert_close(target, expected, rtol=4e-7, atol=1e-6)
        torch.testing.assert_close(fused, eager, rtol=4e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (64, 129)], ids=str)
def test_the_direction_takes_the_place_of_the_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
    eager, fused = ([torch.zeros(shape, dtype=dtype) for _ in range(2)] for _ in range(2))
    for _ in range(3):
        grad = torch.randn(shape, dtype=dtype)
        expected = adam_direction(grad, *eager, **constants)
        fused_adam_(grad, grad, *fused, **constants, replace=True)
        torch.testing.assert_close(grad, expected, rtol=4e-7, atol=1e-7)
        torch.testing.assert_close(fused, eager, rtol=4e-7, atol=1e-7)


def test_it_fits_contiguous_tensors_of_one_wide_dtype_only() -> None:
    a, b = torch.zeros(4, 6), torch.zeros(4, 6)
    assert fused_adam_fits(a, b)
    assert not fused_adam_fits(a, b.double())
    assert not fused_adam_fits(a.bfloat16(), b.bfloat16())
    assert not fused_adam_fits(a, torch.zeros(6, 4).T)
    assert not fused_adam_fits(a.to("meta"), b.to("meta"))
    assert not fused_adam_fits(a, torch.zeros(6, 4)) and not fused_adam_fits(a, torch.zeros(5, 6))


@pytest.mark.parametrize("wrong", range(1, 4))
@pytest.mark.parametrize(
    "other", [torch.zeros(5, 6), torch.zeros(24), torch.zeros(4, 6).double()], ids=["longer", "flat", "fp64"]
)
def test_a_tensor_that_does_not_fit_never_reaches_the_kernel(wrong: int, other: torch.Tensor) -> None:
    tensors = [torch.zeros(4, 6) for _ in range(4)]
    tensors[wrong] = other
    name = ("target", "grad", "exp_avg", "exp_avg_sq")[wrong]
    with pytest.raises(ValueError, match=rf"^Invalid {name}: .*, expected contiguous \(4, 6\) torch.float32"):
        fused_adam_(*tensors, beta1=0.9, beta2=0.999, eps=1e-8, alpha=1.0)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_step_is_that_of_the_eager_backend(rank: int | None, shape: tuple[int, int], contiguous: bool) -> None:
    value = torch.randn(shape)
    params = [nn.Parameter(value.clone() if contiguous else value.T.contiguous().T) for _ in range(2)]
    kwargs = {"rank": rank, "update_proj_gap": 3, "weight_decay": 0.1, "refresh": "svd"}
    optimizers = [GaLoreAdamW([p], backend=backend, **kwargs) for p, backend in zip(params, (None, "eager"))]
    for _ in range(7):
        grad = torch.randn(shape)
        for p, optimizer in zip(params, optimizers):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


def test_full_rank_steps_allocate_nothing_of_the_weight_s_size() -> None:
    p = nn.Parameter(torch.ones(300, 200))
    optimizer = GaLoreAdamW([p], rank=None)
    p.grad = torch.randn_like(p)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    assert max(event.cpu_memory_usage for event in profile.events()) < p.numel()
