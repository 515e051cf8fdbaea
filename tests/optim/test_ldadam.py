"""What is particular to LDAdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_optim import LDAdamW
from tests.conftest import GOLDEN
from tests.reference.ldadam import ldadamw
from tests.temporaries import CountTemporaries

SHAPES = {"tall": (14, 9), "wide": (9, 14), "square": (10, 10)}
METHODS = ["ldadamw_power_iteration", "ldadamw_power_iteration_ef", "ldadamw_svd", "ldadamw_svd_ef"]


def step_with(optimizer: LDAdamW, p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad
    optimizer.step()


@pytest.mark.parametrize("shape", ["tall", "wide", "square", "vector"])
@pytest.mark.parametrize("method", METHODS)
def test_published_trajectories_are_met(
    method: str, shape: str, golden_config: dict[str, Any], golden_inputs: dict[str, np.ndarray],
    record_reference_error: Callable[..., None],
) -> None:  # fmt: skip
    start, expected = golden_inputs[f"param/{shape}"], np.load(GOLDEN / f"{method}.npz")[f"param/{shape}"]
    p = nn.Parameter(torch.tensor(start))
    other = nn.Parameter(torch.ones(9, 9))  # keeps the optimizer from warning about a lone vector
    optimizer = LDAdamW([p, other], **golden_config["methods"][method])
    ours = []
    for step in range(golden_config["steps"]):
        step_with(optimizer, p, torch.tensor(golden_inputs[f"grad/{shape}"][step]))
        if step + 1 in golden_config["kept_steps"]:
            ours.append(p.detach().numpy().copy())
    assert len(ours) == len(expected) == 6
    record_reference_error("LDAdamW", ours, expected, start)
    # Measured: 3e-6 in fp32 and in fp64.
    assert np.abs(np.stack(ours) - expected).max() <= 1e-5 * np.abs(expected - start).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("proj_method", ["power_iteration", "svd"])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_formulas_in_double_precision(shape: str, proj_type: str, proj_method: str, feedback: bool) -> None:
    start = torch.randn(SHAPES[shape], dtype=torch.float64)
    grads = torch.randn(12, *SHAPES[shape], dtype=torch.float64)
    # A dominant subspace, that an SVD finds alike whatever its rounding.
    grads += 4 * torch.randn(14, 3, dtype=torch.float64)[: start.shape[0]] @ torch.randn(3, start.shape[1]).double()
    m, n = start.shape
    left = {"std": m <= n, "reverse_std": m > n, "left": True, "right": False}[proj_type]
    left = True if (proj_type, shape) == ("reverse_std", "square") else left
    common: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rank": 3, "rho": 0.8}
    expected = ldadamw(
        start.numpy(), list(grads.numpy()), left=left, proj_method=proj_method, feedback=feedback, **common
    )
    p = nn.Parameter(start.clone())
    optimizer = LDAdamW([p], proj_type=proj_type, proj_method=proj_method, error_feedback=feedback, **common)
    for grad, weight in zip(grads, expected, strict=True):
        step_with(optimizer, p, grad)
        assert optimizer.state[p]["left"] is left
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=0, atol=1e-10)


def test_the_error_is_what_the_basis_misses_of_gradient_and_momentum() -> None:
    """The momentum of the whole matrix is conserved: none of it is lost when the basis turns."""
    p = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    beta1 = 0.9
    optimizer = LDAdamW([p], rank=3, betas=(beta1, 0.99))
    total = torch.zeros(12, 8, dtype=torch.float64)
    for _ in range(10):
        grad = torch.randn(12, 8, dtype=torch.float64)
        momentum = torch.zeros_like(total)
        if optimizer.state[p]:
            state = optimizer.state[p]
            momentum = state["exp_avg"] @ state["basis"].mT
            total = state["error"].clone()
        step_with(optimizer, p, grad)
        state = optimizer.state[p]
        kept = state["exp_avg"] @ state["basis"].mT
        # M_t Pᵀ + (1 - beta1) E_t is the momentum of the whole matrix, with the error as a part of the gradient.
        whole = beta1 * momentum + (1 - beta1) * (grad + total)
        torch.testing.assert_close(kept + (1 - beta1) * state["error"], whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(state["error"] @ state["basis"], torch.zeros(12, 3).double(), atol=1e-12, rtol=0)


def test_gradients_are_free_and_the_error_is_only_there_where_asked() -> None:
    params = [nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(8))]
    for feedback in (True, False):
        optimizer = LDAdamW(params, rank=3, error_feedback=feedback)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
        assert ("error" in optimizer.state[params[0]]) is feedback
        assert "error" not in optimizer.state[params[1]]


def test_a_longer_gap_keeps_the_basis_between_and_loses_nothing() -> None:
    p = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    optimizer = LDAdamW([p], rank=3, update_proj_gap=3)
    renewed = []
    for step in range(7):
        before = optimizer.state[p]["basis"].clone() if optimizer.state[p] else None
        step_with(optimizer, p, torch.randn(12, 8, dtype=torch.float64))
        if before is None or not torch.equal(before, optimizer.state[p]["basis"]):
            renewed.append(step)
    assert renewed == [0, 3, 6]


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", [(256, 48), (48, 256)])
def test_at_most_one_full_size_temporary(shape: tuple[int, int], feedback: bool) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = LDAdamW([p], rank=4, error_feedback=feedback)
    for _ in range(2):
        step_with(optimizer, p, torch.randn(shape))
    p.grad = torch.randn(shape)
    with CountTemporaries(p.numel()) as counter:
        optimizer.step()
    assert len(counter.created) == int(feedback)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rho": 1.5}, r"Invalid rho: 1.5, expected a number in \[0, 1\]"),
        ({"proj_type": "full"}, "Invalid proj_type: 'full', expected one of 'std', 'reverse_std', 'left', 'right'"),
        ({"proj_method": "qr"}, "Invalid proj_method: 'qr', expected one of 'power_iteration', 'svd'"),
        ({"error_feedback": "int8"}, "Invalid error_feedback: 'int8', expected one of True, False"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LDAdamW([nn.Parameter(torch.ones(8, 8))], rank=2, **kwargs)
