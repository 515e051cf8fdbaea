from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.rounding import join_24_bits, mix_key, random_bits, round_to_bfloat16, split_24_bits


def test_random_bits_are_uniform_and_independent() -> None:
    draws = torch.stack([random_bits(torch.empty(20_000), mix_key(3, step, 1)) for step in range(1, 9)])
    ones = torch.stack([(draws >> bit & 1).double().mean() for bit in range(32)])
    # 160 000 coins: a standard deviation of 1.25e-3.
    assert float((ones - 0.5).abs().max()) < 6e-3
    assert float((torch.corrcoef(draws.double()) - torch.eye(8)).abs().max()) < 0.03
    neighbours = torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])).double())
    assert abs(float(neighbours[0, 1])) < 0.03


def test_random_bits_depend_on_key_and_position_alone() -> None:
    bits = random_bits(torch.empty(6, 7), 5)
    assert torch.equal(bits.flatten(), random_bits(torch.empty(100), 5)[:42])
    assert not torch.equal(bits, random_bits(torch.empty(6, 7), 6))


@pytest.mark.parametrize("step", [0, 1, 123_456])
def test_a_step_on_the_device_gives_the_key_of_the_number(step: int) -> None:
    key = mix_key(7, torch.tensor(float(step)), 2)
    assert isinstance(key, torch.Tensor) and int(key) == mix_key(7, step, 2)
    assert torch.equal(random_bits(torch.empty(9), key), random_bits(torch.empty(9), mix_key(7, step, 2)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.9])
def test_bfloat16_is_hit_on_average_and_by_a_neighbour(sign: float, fraction: float) -> None:
    spacing = 2.0**-7
    values = torch.full((20_000,), sign * (1 + fraction * spacing))
    rounded = round_to_bfloat16(values, 11)
    assert set(rounded.tolist()) <= {sign, sign * (1 + spacing)}
    up = float((rounded.float() / sign - 1).mean()) / spacing
    assert abs(up - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5 + 1e-6


def test_24_bits_are_a_nearest_bfloat16_and_its_rest() -> None:
    values = torch.randn(50_000) * 10 ** (20 * torch.rand(50_000) - 10)
    high, correction = split_24_bits(values, 1)
    joined = join_24_bits(high, correction)
    # 15 fraction bits, stochastically rounded: off by less than one unit, 2^-15 relatively.
    assert float(((joined - values) / values).abs().max()) < 2.0**-15
    # Ties and values within the cut-off 8 bits of a tie may go either way: 1 in 256.
    assert float((high != values.bfloat16()).float().mean()) < 1 / 128
    again = split_24_bits(joined, 99)
    assert torch.equal(again[0], high) and torch.equal(again[1], correction)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.3e38])
def test_special_values_stay_what_they_are(value: float) -> None:
    values = torch.full((4,), value)
    torch.testing.assert_close(round_to_bfloat16(values, 5).float(), values, rtol=1e-2, atol=0, equal_nan=True)
    torch.testing.assert_close(join_24_bits(*split_24_bits(values, 5)), values, rtol=1e-4, atol=0, equal_nan=True)


# What NVIDIA's units make of inf - inf, what a CPU makes, signaling NaN and the last and first of their ranges.
NAN_BITS = [0x7FFFFFFF, 0xFFC00000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF0000, 0x7FBFFFFF]
KEYS = range(50)


def with_bits(bits: int) -> torch.Tensor:
    return torch.full((1000,), bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("bits", NAN_BITS, ids=hex)
def test_every_nan_stays_one(bits: int) -> None:
    values = with_bits(bits)
    for key in KEYS:
        assert bool(round_to_bfloat16(values, key).isnan().all())
        high, correction = split_24_bits(values, key)
        assert bool(high.isnan().all()) and bool(join_24_bits(high, correction).isnan().all())


def test_a_nan_in_bfloat16_stays_one_beside_any_correction() -> None:
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    high = high[high.isnan()]
    for correction in (-128, -1, 0, 127):
        assert bool(join_24_bits(high, torch.full(high.shape, correction, dtype=torch.int8)).isnan().all())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F7F0000], ids=hex)
def test_the_largest_numbers_keep_their_sign_and_stay_numbers(bits: int, sign: int) -> None:
    values = sign * with_bits(bits)
    for key in KEYS:
        high, correction = split_24_bits(values, key)
        for rounded in (round_to_bfloat16(values, key), high, join_24_bits(high, correction)):
            assert bool((sign * rounded >= torch.finfo(torch.bfloat16).max).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_infinities_stay_infinite(sign: int) -> None:
    values = sign * with_bits(0x7F800000)
    for key in KEYS:
        assert torch.equal(round_to_bfloat16(values, key).float(), values)
        assert torch.equal(join_24_bits(*split_24_bits(values, key)), values)
