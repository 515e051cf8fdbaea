"""Rounding fp32 to fewer bits, stochastically: up with the probability of the part that is cut off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The upper half of a quiet NaN. A NaN's bits may be all ones (NVIDIA's are, but for the sign): any that are added to
# them carry over into the sign, and what is left looks like a zero.
QUIET_NAN = 0x7FC0


class Positions(NamedTuple):
    """Where a part of a larger tensor stands in it: its element k at start + k + k // run * skip, counted through.

    run: how many elements of the part are neighbours in the whole.
    skip: how many of other parts stand between two runs.
    first: number in the part of the first element at hand.
    """

    start: int
    run: int
    skip: int
    first: int = 0


def advanced(start: int | Positions, count: int) -> int | Positions:
    """The positions of what comes ``count`` elements later."""
    return start._replace(first=start.first + count) if isinstance(start, Positions) else start + count


def random_bits(like: Tensor, key: int | Tensor, start: int | Positions = 0) -> Tensor:
    """32 random bits for every element of ``like``, as int32, a function of ``key`` and the element's position alone.

    A counter-based hash instead of a generator: the same on every device, on every rank and after a resume, usable
    inside a CUDA graph and under ``torch.compile``. The mixing constants are those of ``lowbias32``
    (Wellons 2018, nullprogram.com/blog/2018/07/31); the first multiplier is 2^32 / golden ratio.

    Args:
        like: gives shape and device.
        key: an int or a 0-d int32 tensor.
        start: position of the first element, where ``like`` is a slice of a flat tensor, or of all of a part.
    """
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    if isinstance(start, Positions):
        bits.add_(start.first)
        bits.add_(torch.div(bits, start.run, rounding_mode="floor").mul_(wrap(start.skip)))
        start = start.start
    bits.add_(wrap(start)).mul_(-0x61C88647)
    bits.bitwise_xor_(key if isinstance(key, Tensor) else wrap(key))
    shifted = torch.empty_like(bits)
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975), (16, None)):
        # int32 shifts repeat the sign; the mask makes a logical shift of it.
        torch.bitwise_right_shift(bits, shift, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            bits.mul_(factor)
    return bits.view(like.shape)


def spread_bits(like: Tensor, key: int | Tensor, step: int | Tensor, start: int | Positions = 0) -> Tensor:
    """As :func:`random_bits`, and spread evenly over the steps for every element: a Kronecker sequence.

    Step t adds t 2^32 / golden ratio, modulo 2^32, to a random start. In each step an element's number is uniform, as
    that of :func:`random_bits`; among T successive ones the share below any bound is right up to O(log T) / T.

    Args:
        like, key, start: as there; the key is the same in every step.
        step: a number or a one-element tensor on the device of ``like``.
    """
    turn = step.to(torch.int32) * -0x61C88647 if isinstance(step, Tensor) else wrap(step * 0x9E3779B9)
    return random_bits(like, key, start).add_(turn)


def mix_key(seed: int, step: int | Tensor, salt: int) -> int | Tensor:
    """A key for :func:`random_bits` from a parameter's seed, its step and a number for the tensor's role."""
    constant = wrap(seed * 0x85EBCA6B + salt * 0xC2B2AE35)
    if isinstance(step, Tensor):
        return step.to(torch.int32) * 0x27D4EB2F + constant
    return wrap(step * 0x27D4EB2F + constant)


def wrap(value: int) -> int:
    """``value`` modulo 2^32, as a signed 32-bit number."""
    return (value + 2**31) % 2**32 - 2**31


def round_to_bfloat16(values: Tensor, key: int | Tensor, start: int | Positions = 0) -> Tensor:
    """``values`` (fp32) in bfloat16, rounded stochastically; the mean over keys is the value itself.

    Infinities and NaN stay what they are; magnitudes beyond bfloat16's largest number may become infinite.
    """
    noise = random_bits(values, key, start).bitwise_and_(0xFFFF)
    # Signs and magnitudes lie apart in a float, so this adds to the magnitude, whatever the sign.
    word = noise.add_(values.view(torch.int32)).bitwise_right_shift_(16)
    return word.masked_fill_(values.isnan(), QUIET_NAN).to(torch.int16).view(torch.bfloat16)


def split_24_bits(values: Tensor, key: int | Tensor, start: int | Positions = 0) -> tuple[Tensor, Tensor]:
    """``values`` (fp32) as the nearest bfloat16 and an int8 correction, 24 bits together.

    The correction counts units of the lowest of the 24 bits (8 exponent, 15 fraction bits); the 8 bits below are
    rounded stochastically. Infinities and NaN stay what they are. The idea of FlashOptim (arXiv 2602.23349);
    :func:`join_24_bits` is the inverse.
    """
    noise = random_bits(values, key, start).bitwise_and_(0xFF)
    word = noise.add_(values.view(torch.int32)).bitwise_right_shift_(8).masked_fill_(values.isnan(), QUIET_NAN << 8)
    high = (word + 128) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (word - (high << 8)).to(torch.int8)


def join_24_bits(high: Tensor, correction: Tensor) -> Tensor:
    """fp32 values from a bfloat16 and an int8 tensor of the same shape."""
    word = (high.view(torch.int16).to(torch.int32) << 8) + correction.to(torch.int32)
    return (word << 8).view(torch.float32)
