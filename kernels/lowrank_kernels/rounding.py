"""What ``lowrank_optim.ops.rounding`` does, for the kernels that round."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from lowrank_optim.ops.rounding import QUIET_NAN

NAN = tl.constexpr(QUIET_NAN << 16)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def random_bits(position, key):
    """32 bits as uint32 of a counter and a key, an int32 each."""
    bits = position.to(tl.uint32) * 0x9E3779B9
    bits = bits ^ key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def add_to_word(values, some):
    """The bits of fp32 values whose magnitude has been raised by some units of the last place; a NaN becomes quiet."""
    word = values.to(tl.int32, bitcast=True)
    return tl.where((word & 0x7FFFFFFF) > 0x7F800000, NAN, word + some)


@triton.jit
def round_to_nearest(values, dtype: tl.constexpr):
    """fp32 in any floating dtype, the even one in the middle."""
    if INTERPRETED and dtype == tl.bfloat16:
        # It cuts off, where hardware rounds.
        word = add_to_word(values, 0x7FFF + ((values.to(tl.int32, bitcast=True) >> 16) & 1))
        return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def round_to_bfloat16(values, bits):
    """fp32 in bfloat16, up with the probability of the part that is cut off."""
    word = add_to_word(values, (bits & 0xFFFF).to(tl.int32))
    return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_whole(values, bits):
    """fp32 as whole numbers, up with the probability of the part that is cut off."""
    below = tl.floor(values)
    # 24 bits, all of which fp32 has.
    up = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return below + tl.where(up < values - below, 1.0, 0.0)


@triton.jit
def split_24_bits(values, bits):
    """fp32 as the nearest bfloat16 and an int8 correction, the eight bits below rounded stochastically."""
    word = add_to_word(values, (bits & 0xFF).to(tl.int32)) >> 8
    high = (word + 128) >> 8
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (word - (high << 8)).to(tl.int8)


@triton.jit
def join_24_bits(high, correction):
    """fp32 from a bfloat16 and an int8."""
    word = (high.to(tl.int16, bitcast=True).to(tl.int32) << 8) + correction.to(tl.int32)
    return (word << 8).to(tl.float32, bitcast=True)


@triton.jit
def store_rounded(pointer, correction, value, position, key, mask, ROUNDING: tl.constexpr):
    """Store fp32 values of a weight: "nearest", "stochastic", or "compensated" with what is left as corrections."""
    if ROUNDING == "nearest":
        tl.store(pointer, round_to_nearest(value, pointer.dtype.element_ty), mask=mask)
    else:
        bits = random_bits(position, tl.zeros_like(value).to(tl.int32) + key)
        if ROUNDING == "stochastic":
            tl.store(pointer, round_to_bfloat16(value, bits), mask=mask)
        else:
            high, low = split_24_bits(value, bits)
            tl.store(pointer, high, mask=mask)
            tl.store(correction, low, mask=mask)


def aot_cases() -> list[object]:
    """None: these are parts of kernels."""
    return []
