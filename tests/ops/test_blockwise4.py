"""4-bit moments: the two maps, and rounding that is right in the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops.blockwise4 import block_count, code_map, dequantize, quantize_

CPU = torch.device("cpu")


def round_trip(values: Tensor, *, signed: bool, key: int = 3, step: int = 0) -> Tensor:
    codes = torch.full((*values.shape[:-1], values.shape[-1] // 2), 0xAB, dtype=torch.uint8)
    scale = torch.full((block_count(values.numel()),), torch.nan)
    quantize_(codes, scale, values, key, step=step, signed=signed)
    return dequantize(codes, scale, signed=signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(128,), (3, 300), (2, 5, 14), (0, 4)], ids=str)
def test_values_of_the_map_come_back_and_others_become_a_neighbour(signed: bool, shape: tuple[int, ...]) -> None:
    found = code_map(signed, CPU)
    assert len(found) == 16 and torch.equal(found, found.sort().values) and found[-1] == 1
    exact = found[(15 - torch.arange(torch.Size(shape).numel()).view(shape)) % 16]
    torch.testing.assert_close(round_trip(exact * 2.0**-7, signed=signed), exact * 2.0**-7)
    values = torch.randn(shape) if signed else torch.rand(shape)
    back = round_trip(values, signed=signed)
    for block, restored in zip(values.flatten().split(128), back.flatten().split(128)):
        if block.numel():
            grid = found * max(float(block.max()), float(block.min() / found[0]) if signed else 0.0)
            upper = torch.searchsorted(grid, block).clamp(1, 15)
            distance = torch.minimum((restored - grid[upper - 1]).abs(), (restored - grid[upper]).abs())
            assert bool((distance <= 1e-6).all())


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_over_the_steps_is_the_value(signed: bool) -> None:
    values = torch.linspace(0.001, 1, 256).view(2, 128)
    values = values * torch.tensor([1, -1]).repeat(64) if signed else values
    mean = torch.stack([round_trip(values, signed=signed, step=step) for step in range(200)]).mean(0)
    torch.testing.assert_close(mean, values, rtol=0, atol=0.005)


def test_positive_values_stay_positive_and_blocks_of_zeros_zero() -> None:
    values = torch.zeros(4, 128)
    values[0], values[1, 5], values[2] = 1e-30, 1e30, torch.linspace(1e-20, 1, 128)
    back = round_trip(values, signed=False)
    assert bool((back[:3] > 0).all()) and not back[3].any() and bool(back.isfinite().all())
    assert torch.equal(round_trip(torch.zeros(4, 128), signed=True), torch.zeros(4, 128))
    infinite = torch.ones(2, 128)
    infinite[0, 0] = torch.inf
    assert bool(round_trip(infinite, signed=False).isfinite().all())
