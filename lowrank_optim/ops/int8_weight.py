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
    for block in row_slices(rows, columns):
        wide = values[block].to(torch.float32)
        share = None if key is None else as_share(random_bits(wide, key, start + block.start * columns))
        round_groups_(codes[block], scale[block], wide, share, group=GROUP, largest=LARGEST)


def dequantize_int8_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (m, n) that :func:`quantize_int8_weight_` wrote, each rounded once to ``dtype``."""
    values = codes.new_empty(codes.shape, dtype=dtype)
    for block in row_slices(*codes.shape):
        scale_groups_(values[block], codes[block], scale[block], group=GROUP)
    return values


def round_groups_(
    codes: Tensor, scale: Tensor, values: Tensor, share: Tensor | None, *, group: int, largest: int
) -> None:
    """Some rows of fp32 values as integers of at most ``largest`` and a scale for every ``group`` neighbours.

    ``share`` in [0, 1) is above the part cut off where a value is rounded down; None rounds to nearest.
    """
    for within, groups, width in _spans(values.shape[1], group):
        shape = (len(values), groups.stop - groups.start, width)
        value = values[:, within].view(shape)
        step = value.abs().amax(-1, keepdim=True).div_(largest)
        scale[:, groups].unsqueeze(-1).copy_(step)
        ticks = value * step.clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
        if share is None:
            ticks.round_()
        else:
            below = ticks.floor()
            ticks = below + (share[:, within].view(shape) < ticks - below)
        codes[:, within].view(shape).copy_(ticks.clamp_(-largest, largest))


def scale_groups_(values: Tensor, codes: Tensor, scale: Tensor, *, group: int) -> None:
    """values = codes * scale for some rows, scales as :func:`round_groups_` makes them."""
    for within, groups, width in _spans(codes.shape[1], group):
        shape = (len(codes), groups.stop - groups.start, width)
        code, value = (tensor[:, within].view(shape) for tensor in (codes, values))
        value.copy_(code * scale[:, groups].unsqueeze(-1))


def row_slices(rows: int, columns: int) -> list[slice]:
    """Rows that the eager functions work on at a time."""
    # A compiler makes one kernel of the whole, without temporaries.
    size = max(1, rows if torch.compiler.is_compiling() else BLOCK // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def as_share(bits: Tensor) -> Tensor:
    """Random bits as numbers in [0, 1), multiples of 2^-24, of which fp32 has all."""
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _spans(columns: int, group: int) -> list[tuple[slice, slice, int]]:
    """Columns, scales and width of the whole groups of a row, and of the last, shorter one."""
    whole = columns // group
    middle = whole * group
    spans = [(slice(0, middle), slice(0, whole), group)] if whole else []
    if middle < columns:
        spans.append((slice(middle, columns), slice(whole, whole + 1), columns - middle))
    return spans
