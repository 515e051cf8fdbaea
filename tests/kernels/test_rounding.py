"""The roundings inside of kernels against the eager ones: the same bits, those of NaN and infinity too."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import rounding

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
parts = pytest.importorskip("lowrank_kernels.rounding")
N = 1024
SPECIAL = [0x7FFFFFFF, 0xFFC00000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF0000, 0x7FBFFFFF]
SPECIAL += [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0xFF7F7FFF, 0x00000000, 0x80000000, 0x00000001]


@triton.jit
def kernel(values_ptr, nearest_ptr, stochastic_ptr, high_ptr, correction_ptr, joined_ptr, key, N: tl.constexpr):
    at = tl.arange(0, N)
    values = tl.load(values_ptr + at)
    bits = parts.random_bits(at, tl.zeros((N,), tl.int32) + key)
    tl.store(nearest_ptr + at, parts.round_to_nearest(values, tl.bfloat16))
    tl.store(stochastic_ptr + at, parts.round_to_bfloat16(values, bits))
    high, correction = parts.split_24_bits(values, bits)
    tl.store(high_ptr + at, high)
    tl.store(correction_ptr + at, correction)
    tl.store(joined_ptr + at, parts.join_24_bits(high, correction))


@pytest.mark.parametrize("key", [0, 5, -77])
def test_bits_are_the_eager_ones(key: int, device: torch.device) -> None:
    words = torch.tensor(SPECIAL, dtype=torch.int64).to(torch.int32).repeat(N)[:N]
    words[N // 2 :] = torch.randint(-(2**31), 2**31, (N // 2,), dtype=torch.int64).to(torch.int32)
    values = words.view(torch.float32).to(device)
    nearest, stochastic, high = (torch.empty(N, dtype=torch.bfloat16, device=device) for _ in range(3))
    correction, joined = torch.empty(N, dtype=torch.int8, device=device), torch.empty(N, device=device)
    kernel[(1,)](values, nearest, stochastic, high, correction, joined, key, N=N)

    expected = rounding.split_24_bits(values, key)
    for ours, theirs in (
        (stochastic, rounding.round_to_bfloat16(values, key)),
        (high, expected[0]),
        (correction, expected[1]),
        (joined, rounding.join_24_bits(*expected)),
    ):
        word = {1: torch.int8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
        assert torch.equal(ours.view(word), theirs.view(word))
    torch.testing.assert_close(nearest, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    for rounded in (nearest, stochastic, high, joined):
        assert torch.equal(rounded.isnan(), values.isnan())
