"""What is particular to Q-GaLore: refreshes that become rare, and a basis of 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import QGaLoreAdamW8bit
from lowrank_optim.optim.qgalore import LazyInt4


def refresh_steps(grads: Any, steps: int, **kwargs: Any) -> list[int]:
    """0-based steps at which the basis is computed."""
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = QGaLoreAdamW8bit([p], lr=0.0, **{"rank": 4, **kwargs})
    seen: list[int] = []
    for step in range(steps):
        before = optimizer.refresh_seconds
        p.grad = grads(step)
        optimizer.step()
        if optimizer.refresh_seconds != before:
            seen.append(step)
    return seen


@pytest.mark.parametrize("refresh", ["svd", "randomized", "power"])
def test_the_gap_doubles_as_published_while_the_subspace_stands_still(refresh: str) -> None:
    """Gap 200 and 20 000 steps of the paper, scaled by 1/20: 11 refreshes instead of 100."""
    grad = torch.randn(24, 4) @ torch.randn(4, 16)
    # The sign of the gradient, and with it of singular vectors, is no change of the subspace.
    seen = refresh_steps(lambda step: grad * (-1) ** (step // 10), 1000, update_proj_gap=10, refresh=refresh)
    assert seen == [10 * k for k in (0, 1, 2, 3, 4, 5, 6, 8, 16, 32, 64)]


def test_a_moving_subspace_is_refreshed_at_every_gap() -> None:
    generator = torch.Generator().manual_seed(0)

    def grads(_: int) -> torch.Tensor:
        return torch.randn(24, 16, generator=generator)

    assert refresh_steps(grads, 200, update_proj_gap=10) == list(range(0, 200, 10))


@pytest.mark.parametrize(("gamma", "gap"), [(1.0, 10), (1.5, 15)])
def test_gamma_is_the_growth_of_the_gap(gamma: float, gap: int) -> None:
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = QGaLoreAdamW8bit([p], rank=4, update_proj_gap=10, gamma_proj=gamma, queue_size=1)
    grad = torch.randn(24, 16)
    for _ in range(11):
        p.grad = grad
        optimizer.step()
    assert optimizer.state[p]["gap"] == gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_the_basis_is_half_a_byte_and_nearly_the_dominant_one(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = QGaLoreAdamW8bit([p], rank=5, refresh="svd", quant_group_size=16)
    grad = torch.randn(shape, dtype=dtype)
    p.grad = grad
    optimizer.step()
    state = optimizer.state[p]
    assert "basis" not in state
    values = 16 * 5 * (2 if dtype.is_complex else 1)
    assert state["basis.codes"].numel() == 16 * -(-values // 16 // 2)
    basis = LazyInt4().basis(grad, state, optimizer.param_groups[0])
    tall = grad.mT if shape[0] < shape[1] else grad
    wide = torch.complex64 if dtype.is_complex else torch.float32
    exact = torch.linalg.svd(tall.to(wide)).Vh[:5].mH
    assert basis.dtype == dtype and basis.shape == (16, 5)
    share = (exact.mH @ basis.to(wide)).abs().square().sum() / 5
    assert float(share) == pytest.approx(1.0, abs=0.06)


def test_keys_of_the_published_groups_are_taken_or_refused() -> None:
    method = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    lazy = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    published = {**method, **lazy, "quant": True, "quant_n_bit": 4, "quant_group_size": 256}
    p = nn.Parameter(torch.zeros(24, 16))
    p.grad = torch.randn(24, 16)
    QGaLoreAdamW8bit([{"params": [p], **published}]).step()
    wrong = {"quant": False, "quant_n_bit": 8, "quant_group_size": 0}
    for key, value in {**wrong, "cos_threshold": 1.5, "gamma_proj": 0.5, "queue_size": 0}.items():
        with pytest.raises(ValueError, match=f"Invalid {key}: {value}"):
            QGaLoreAdamW8bit([{"params": [p], **published, key: value}])
