"""Every row of the table with kernels as without, weights in fp32 and bfloat16, a stack of matrices among them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conformance import FP32_AND_SLOW_BF16, every_variant, noise, quiet, values, without_draws

# Sides that no tile divides.
SHAPES = [(19, 7), (2, 7, 13), (5,)]


@pytest.fixture(autouse=True)
def _small_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)


def run(name: str, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device, backend: str) -> list[Tensor]:
    params = [nn.Parameter(draw.to(device, dtype)) for draw in noise(SHAPES, 0)]
    optimizer = quiet(name, params, backend=backend, **{"weight_decay": 0.1, "update_proj_gap": 2, **kwargs})
    for step in range(3):
        for p, draw in zip(params, noise(SHAPES, step + 1)):
            p.grad = draw.to(device, dtype)
        optimizer.step()
    return [value.float() for value in values(optimizer, params)]


@every_variant
@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
def test_kernels_and_eager_agree(name: str, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    # A refresh that starts from noise differs by more than its rounding where singular values are close.
    fixed = without_draws(name, kwargs) if name.startswith("GaLore") else kwargs
    if name == "GaLoreAdafactor" and find_spec("lowrank_kernels.adafactor_direction") is None:
        with pytest.raises(RuntimeError, match="has no kernel 'adafactor_direction'"):
            run(name, fixed, dtype, device, "triton")
        return
    if kwargs.get("state_dtype") == "int4":
        with pytest.raises(ValueError, match="no kernel"):
            run(name, fixed, dtype, device, "triton")
        return
    theirs, ours = (run(name, fixed, dtype, device, backend) for backend in ("eager", "triton"))
    # Rounded to 8 bits, or to bfloat16, a value may come to lie on the other side.
    coarse = (
        kwargs.get("state_dtype", "float32") != "float32" or "8bit" in name or kwargs.get("error_feedback") == "int8"
    )
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-3 if coarse else 1e-5
    for a, b in zip(theirs, ours):
        assert bool(b.isfinite().all())
        assert float((a - b).norm() / a.norm()) < bound
