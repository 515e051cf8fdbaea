"""Int8 weights: the format, and that stochastic rounding realises small updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import int8_weight
from lowrank_optim.ops.int8_weight import dequantize_int8_weight, quantize_int8_weight_, scale_shape
from lowrank_optim.ops.rounding import mix_key


def quantized(values: Tensor, key: int | None = None) -> tuple[Tensor, Tensor]:
    codes = torch.full(values.shape, -128, dtype=torch.int8)
    scale = torch.full(scale_shape(*values.shape), torch.nan)
    quantize_int8_weight_(codes, scale, values, key)
    return codes, scale


@pytest.mark.parametrize("key", [None, 7])
@pytest.mark.parametrize("shape", [(3, 256), (5, 700), (4, 5461), (7, 1), (2, 85), (0, 300), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_value_comes_back_within_a_step_of_its_group(
    shape: tuple[int, int], dtype: torch.dtype, key: int | None
) -> None:
    values = torch.randn(shape).to(dtype)
    codes, scale = quantized(values, key)
    back = dequantize_int8_weight(codes, scale, torch.float32)
    step = torch.zeros(shape)
    for g in range(scale.shape[1]):
        group = values[:, g * 256 : (g + 1) * 256]
        torch.testing.assert_close(scale[:, g], group.abs().amax(1).float() / 127)
        step[:, g * 256 : (g + 1) * 256] = scale[:, g : g + 1]
    assert torch.all((back - values).abs() <= step * (0.5001 if key is None else 1.0001))
    assert torch.equal(dequantize_int8_weight(codes, scale, torch.bfloat16), back.bfloat16())


def test_groups_of_one_sign_survive_and_zeros_stay_zeros() -> None:
    values = torch.zeros(3, 600)
    values[0] = torch.linspace(1.0, 1.1, 600)
    values[1] = 1e-42
    for key in (None, 3):
        codes, scale = quantized(values, key)
        back = dequantize_int8_weight(codes, scale, torch.float32)
        assert (back[0] - values[0]).abs().max() <= 1.1 / 127
        assert torch.all(back[1].abs() <= 2e-42)
        assert not codes[2].any() and not scale[2].any()


def test_blocks_of_rows_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 300)
    whole = quantized(values, 5)
    monkeypatch.setattr(int8_weight, "BLOCK", 700)
    for one, other in zip(whole, quantized(values, 5)):
        assert torch.equal(one, other)
    assert torch.equal(dequantize_int8_weight(*whole, torch.float32), dequantize_int8_weight(*whole, torch.float32))


def test_rounding_at_rest_moves_nothing() -> None:
    values = torch.randn(16, 512)
    codes, scale = quantized(values)
    before = dequantize_int8_weight(codes, scale, torch.float32)
    for step in range(20):
        quantize_int8_weight_(codes, scale, dequantize_int8_weight(codes, scale, torch.float32), mix_key(1, step, 0))
    # The reciprocal of a scale is rounded, so that a code is an integer up to 2e-5.
    assert (dequantize_int8_weight(codes, scale, torch.float32) != before).float().mean() < 1e-3


@pytest.mark.parametrize("update", [0.3, 0.1, 0.03, 0.01, 0.003])
def test_small_updates_are_realised_on_average(update: float) -> None:
    """Of an update of 0.003 steps an iteration, arithmetic in bfloat16 would realise 4 %."""
    torch.manual_seed(1)
    values = torch.randn(64, 1024)
    # The largest of a group stays, so that a step stays what it is.
    codes, scale = quantized(values)
    start = dequantize_int8_weight(codes, scale, torch.float32)
    sign = torch.where(codes.abs() < 100, torch.randn(values.shape).sign(), 0)
    change = (update * sign.view(64, -1, 256) * scale.unsqueeze(-1)).view_as(values)
    iterations = min(400, int(20 / update))
    for step in range(iterations):
        quantize_int8_weight_(
            codes, scale, dequantize_int8_weight(codes, scale, torch.float32) + change, mix_key(0, step, 0)
        )
    drift = (dequantize_int8_weight(codes, scale, torch.float32) - start) / (scale.repeat_interleave(256, 1))
    realised = float((drift * sign).sum() / (sign != 0).sum() / (update * iterations))
    assert realised == pytest.approx(1, abs=0.02)


def test_the_noise_is_that_of_rounding_each_update_once() -> None:
    """With a fixed step an update of x steps adds a variance of x (1 - x); renewing the scale adds next to nothing."""
    values = 0.02 * torch.randn(64, 1024)
    codes, scale = quantized(values)
    exact = dequantize_int8_weight(codes, scale, torch.float32)
    tick, variance = float(scale.mean()), 0.0
    for step in range(300):
        change = 0.03 * tick * torch.randn(values.shape)
        ticks = (change.view(64, -1, 256) / scale.unsqueeze(-1)).abs()
        variance += float((ticks - ticks.floor()).mul(1 - ticks + ticks.floor()).mean())
        exact += change
        value = dequantize_int8_weight(codes, scale, torch.float32) + change
        quantize_int8_weight_(codes, scale, value, mix_key(0, step, 0))
    noise = float((dequantize_int8_weight(codes, scale, torch.float32) - exact).square().mean().sqrt())
    assert noise <= 1.15 * variance**0.5 * tick
