"""Int8 weights: 256 neighbours in a row share one fp32 scale, value = code * scale."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import random_bits

GROUP = 256
LARGEST = 127

# Values that the eager functions work on at a time, so that their fp32 temporaries do not grow with the weight.
BLOCK = 1 << 22


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales of a (rows, columns) weight; the last group of a row may be shorter."""
    return rows, -(-columns // GROUP)


def quantize_int8_weight_(
    codes: Tensor, scale: Tensor, values: Tensor, key: int | Tensor | None = None, *, start: int = 0
) -> None:
    """Write ``values`` as code * scale with scale = max|group| / 127, all in fp32.

    Symmetric, so that a group of one sign, such as [1.0, 1.1], and a group of zeros need no care. The scale is renewed
    at every call: a scale that is kept as long as it fits leaves a weight no closer to an unrounded one after 1000
    stochastically rounded updates, and powers of two lie 17 % further off.

    Args:
        codes: int8 (m, n) (modified in place).
        scale: fp32 (m, groups), as :func:`scale_shape` says (modified in place).
        values: (m, n), real.
        key: of the random bits (:func:`lowrank_optim.ops.rounding.random_bits`, by position in the whole weight) with
            which a value is rounded up with the probability of the part cut off; None rounds to the nearest code.
        start: position of the first value, where these are some rows of a weight.
    """
    rows, columns = values.shape
    for block in _row_blocks(rows, columns):
        wide = values[block].to(torch.float32)
        share = None if key is None else _uniform(wide, key, start + block.start * columns)
        for within, groups, width in _spans(columns):
            shape = (len(wide), groups.stop - groups.start, width)
            value = wide[:, within].view(shape)
            step = value.abs().amax(-1, keepdim=True).div_(LARGEST)
            scale[block, groups].unsqueeze(-1).copy_(step)
            ticks = value * step.clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
            if share is None:
                ticks.round_()
            else:
                below = ticks.floor()
                ticks = below + (share[:, within].view(shape) < ticks - below)
            codes[block, within].view(shape).copy_(ticks.clamp_(-LARGEST, LARGEST))


def dequantize_int8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (m, n) that :func:`quantize_int8_weight_` wrote, each rounded once to ``dtype``."""
    values = codes.new_empty(codes.shape, dtype=dtype)
    for block in _row_blocks(*codes.shape):
        for within, groups, width in _spans(codes.shape[1]):
            shape = (block.stop - block.start, groups.stop - groups.start, width)
            code, value = (tensor[block, within].view(shape) for tensor in (codes, values))
            value.copy_(code * scale[block, groups].unsqueeze(-1))
    return values


def _row_blocks(rows: int, columns: int) -> list[slice]:
    # A compiler makes one kernel of the whole, without temporaries.
    size = max(1, rows if torch.compiler.is_compiling() else BLOCK // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _spans(columns: int) -> list[tuple[slice, slice, int]]:
    """Columns, scales and width of the whole groups of a row, and of the last, shorter one."""
    whole = columns // GROUP
    middle = whole * GROUP
    spans = [(slice(0, middle), slice(0, whole), GROUP)] if whole else []
    if middle < columns:
        spans.append((slice(middle, columns), slice(whole, whole + 1), columns - middle))
    return spans


def _uniform(like: Tensor, key: int | Tensor, start: int) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, of which fp32 has all."""
    return ((random_bits(like, key, start=start) >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)
