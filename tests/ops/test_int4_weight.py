"""Int4 weights: the format, and that rounding that is spread over the steps realises small updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import int8_weight
from lowrank_optim.ops.int4 import pack, packed_shape, unpack
from lowrank_optim.ops.int4_weight import dequantize_int4_weight, quantize_int4_weight_, scale_shape
from lowrank_optim.ops.lowrank_update_int4 import lowrank_update_int4_
from lowrank_optim.ops.rounding import random_bits, spread_bits


def quantized(values: Tensor, key: int | None = None) -> tuple[Tensor, Tensor]:
    codes = torch.full(packed_shape(*values.shape), 0xAB, dtype=torch.uint8)
    scale = torch.full(scale_shape(*values.shape), torch.nan)
    quantize_int4_weight_(codes, scale, values, key)
    return codes, scale


def values_of(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    return dequantize_int4_weight(codes, scale, columns, torch.float32)


@pytest.mark.parametrize("key", [None, 7])
@pytest.mark.parametrize("shape", [(3, 128), (5, 341), (4, 5461), (7, 1), (2, 85), (0, 300), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_value_comes_back_within_a_step_of_its_group(
    shape: tuple[int, int], dtype: torch.dtype, key: int | None
) -> None:
    values = torch.randn(shape).to(dtype)
    codes, scale = quantized(values, key)
    back = values_of(codes, scale, shape[1])
    step = scale.repeat_interleave(128, 1)[:, : shape[1]]
    largest = [group.abs().amax(1) for group in values.float().split(128, 1) if group.numel()]
    if largest:
        torch.testing.assert_close(scale, torch.stack(largest, 1) / 7)
    assert torch.all((back - values).abs() <= step * (0.5001 if key is None else 1.0001))
    assert torch.equal(dequantize_int4_weight(codes, scale, shape[1], torch.bfloat16), back.bfloat16())


def test_half_a_byte_a_value_and_a_zero_in_the_unused_half() -> None:
    codes, scale = quantized(torch.randn(5, 301))
    assert codes.shape == (5, 151) and scale.shape == (5, 3)
    assert torch.equal(unpack(codes, 302)[:, -1], torch.full((5,), 8, dtype=torch.uint8))
    some = torch.randint(16, (3, 4, 7), dtype=torch.uint8)
    assert torch.equal(unpack(pack(some), 7), some)


def test_groups_of_one_sign_survive_and_zeros_stay_zeros() -> None:
    values = torch.zeros(3, 300)
    values[0] = torch.linspace(1.0, 1.1, 300)
    values[1] = 1e-42
    for key in (None, 3):
        back = values_of(*quantized(values, key), 300)
        assert (back[0] - values[0]).abs().max() <= 1.1 / 7
        assert torch.all(back[1].abs() <= 2e-42)
        assert not back[2].any()


def test_blocks_of_rows_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 301)
    whole = quantized(values, 5)
    back = values_of(*whole, 301)
    monkeypatch.setattr(int8_weight, "BLOCK", 700)
    assert all(torch.equal(one, other) for one, other in zip(whole, quantized(values, 5)))
    assert torch.equal(values_of(*whole, 301), back)


def test_a_step_without_an_update_moves_next_to_nothing() -> None:
    values = torch.randn(16, 512)
    codes, scale = quantized(values)
    before = values_of(codes, scale, 512)
    for step in range(20):
        quantize_int4_weight_(codes, scale, values_of(codes, scale, 512), 1, step=step)
    # The reciprocal of a scale is rounded, so that a code is an integer up to 1e-6.
    assert (values_of(codes, scale, 512) != before).float().mean() < 1e-3


def test_random_numbers_of_an_element_are_uniform_in_a_step_and_even_over_the_steps() -> None:
    like = torch.empty(50, 40)
    assert torch.equal(spread_bits(like, 7, 0), random_bits(like, 7))
    for step in (3, torch.tensor(3)):
        assert torch.equal(spread_bits(like[10:], 7, step, start=400), spread_bits(like, 7, 3)[10:])
    drawn = torch.stack([int8_weight.as_share(spread_bits(like, 7, step)) for step in range(200)])
    for bound in (0.03, 0.3):
        below = drawn < bound
        # In one step independent, with the deviation of 2000 draws; over 200 steps right up to a few.
        assert abs(float(below[0].float().mean()) - bound) < 5 * math.sqrt(bound * (1 - bound) / 2000)
        counts = below.sum(0)
        assert (counts - 200 * bound).abs().max() <= 3


@pytest.mark.parametrize("update", [0.3, 0.03, 0.003])
def test_small_updates_are_realised_with_little_noise(update: float) -> None:
    values = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    codes, scale = quantized(values)
    start = values_of(codes, scale, 256)
    # The largest of a group stays, so that a step stays what it is.
    inner = (start.view(16, 2, 128) / scale.unsqueeze(-1)).round().abs() <= 2
    change = (update * inner * scale.unsqueeze(-1)).view_as(values)
    steps = min(200, int(3 / update))
    for step in range(steps):
        quantize_int4_weight_(codes, scale, values_of(codes, scale, 256) + change, 0, step=step)
    moved = ((values_of(codes, scale, 256) - start).view(16, 2, 128) / scale.unsqueeze(-1))[inner]
    assert float(moved.mean()) == pytest.approx(update * steps, rel=0.03)
    # Independent draws would spread it by sqrt(steps update (1 - update)), 0.77 to 1.7 grid steps.
    assert float(moved.std()) < 0.7


@pytest.mark.parametrize("terms", ["product", "gradient", "decay"])
def test_the_update_is_that_of_the_values(terms: str) -> None:
    torch.manual_seed(0)
    m, n = 6, 131
    codes, scale = quantized(torch.randn(m, n))
    W = values_of(codes, scale, n)
    left, right = torch.randn(m, 2), torch.randn(n, 2)
    grad, row_scale, column_scale = torch.randn(m, n), torch.rand(m, 1), torch.rand(1, n)
    expected = 0.9 * W
    options: dict[str, Tensor] = {}
    if terms == "product":
        expected += 0.1 * left @ right.T
    elif terms == "gradient":
        expected += row_scale * grad * column_scale
        options = {"grad": grad, "row_scale": row_scale, "column_scale": column_scale}
    sides = (left, right) if terms == "product" else (None, None)
    lowrank_update_int4_(codes, scale, *sides, columns=n, alpha=0.1, decay=0.9, key=3, step=5, **options)
    found = quantized(expected)[0].clone(), scale
    quantize_int4_weight_(*found, expected, 3, step=5)
    torch.testing.assert_close(values_of(codes, scale, n), values_of(*found, n))
