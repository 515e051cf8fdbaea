from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.newton_schulz import newton_schulz


@pytest.mark.parametrize("shape", [(5, 5), (40, 8), (65, 64), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e6])
def test_singular_values_come_to_lie_in_the_known_band(
    shape: tuple[int, int], dtype: torch.dtype, magnitude: float
) -> None:
    """Measured elsewhere for these coefficients: [0.68, 1.2] up to a condition of 100."""
    u, _ = torch.linalg.qr(torch.randn(shape, dtype=dtype))
    v, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=dtype))
    result = newton_schulz(magnitude * (u * torch.logspace(0, -2, shape[1])) @ v.mH)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.66 and values.max() < 1.21
    # The singular vectors are those of the input.
    turned = u.mH @ result @ v
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), atol=2e-4, rtol=0)


def test_zero_stays_zero_and_bfloat16_is_computed_in_fp32() -> None:
    assert torch.equal(newton_schulz(torch.zeros(6, 3)), torch.zeros(6, 3))
    assert newton_schulz(torch.randn(6, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_more_steps_reach_smaller_directions() -> None:
    u, _ = torch.linalg.qr(torch.randn(30, 10, dtype=torch.float64))
    tall = u * torch.logspace(0, -4, 10)
    few, many = (torch.linalg.svdvals(newton_schulz(tall, steps=steps)).min() for steps in (5, 9))
    assert few < 0.3 and many > 0.66
