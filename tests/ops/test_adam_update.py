"""The whole step of Adam, of which the kernel has a twin, against its formula."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.adam_update import adam_update_
from lowrank_optim.ops.rounding import join_24_bits


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_a_weight_of_16_bits_is_rounded_as_asked(rounding: str) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(64, 33).bfloat16(), torch.randn(64, 33)
    exact = 0.9 * start.double() - 0.01 * grad.sign().double()
    weight, correction = start.clone(), torch.zeros(64, 33, dtype=torch.int8)
    options = {"nearest": {}, "stochastic": {"key": 3}, "compensated": {"key": 3, "correction": correction}}
    adam_update_(
        weight, grad, torch.zeros(64, 33), torch.zeros(64, 33), beta1=0.0, beta2=0.0, eps=0.0, alpha=-0.01, decay=0.9,
        **options[rounding],
    )  # fmt: skip
    found = weight if rounding != "compensated" else join_24_bits(weight, correction)
    # Half a place of 8 bits, a whole one, or one of 16 bits.
    places = {"nearest": 2.0**-9, "stochastic": 2.0**-8, "compensated": 2.0**-15}
    error = (found.double() - exact).abs() / exact.abs()
    assert float(error.max()) <= 2 * places[rounding]
    assert bool(correction.any()) is (rounding == "compensated")
    nearest = exact.to(torch.bfloat16)
    assert torch.equal(weight, nearest) is not (rounding == "stochastic")
