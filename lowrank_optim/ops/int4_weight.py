"""Int4 weights: 128 neighbours in a row share one fp32 scale, value = code * scale, two codes a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.int4 import pack, unpack
from lowrank_optim.ops.int8_weight import as_share, round_groups_, row_slices, scale_groups_
from lowrank_optim.ops.rounding import spread_bits

GROUP = 128
LARGEST = 7
# What is stored is code + ZERO.
ZERO = 8


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales of a (rows, columns) weight; the last group of a row may be shorter."""
    return rows, -(-columns // GROUP)


def quantize_int4_weight_(
    codes: Tensor, scale: Tensor, values: Tensor, key: int | Tensor | None = None, *,
    step: int | Tensor = 0, start: int = 0,
) -> None:  # fmt: skip
    """Write ``values`` as code * scale with codes -7..7 and scale = max|group| / 7, all in fp32.

    A step of the grid is a third of a weight's deviation, so that independent random numbers would make of the updates
    a random walk as wide as the weights. Over the steps the numbers of one weight are therefore spread evenly
    (:func:`lowrank_optim.ops.rounding.spread_bits`): of an update of u grid steps, T in a row move it by T u up to
    about one, not up to sqrt(T u).

    Args:
        codes: uint8 (m, ceil(n / 2)), as :func:`lowrank_optim.ops.int4.packed_shape` says (modified in place).
        scale: fp32 (m, groups), as :func:`scale_shape` says (modified in place).
        values: (m, n), real.
        key: of the random numbers, the same in every step; a value is rounded up with the probability of the part cut
            off. None rounds to the nearest code.
        step: number of the update.
        start: position of the first value, where these are some rows of a weight.
    """
    rows, columns = values.shape
    for block in row_slices(rows, columns):
        wide = values[block].to(torch.float32)
        share = None if key is None else as_share(spread_bits(wide, key, step, start + block.start * columns))
        code = torch.empty(wide.shape, dtype=torch.int8, device=wide.device)
        round_groups_(code, scale[block], wide, share, group=GROUP, largest=LARGEST)
        codes[block] = pack(code.add_(ZERO).view(torch.uint8), fill=ZERO)


def dequantize_int4_weight(codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The values (m, columns) that :func:`quantize_int4_weight_` wrote, each rounded once to ``dtype``."""
    values = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
    for block in row_slices(*values.shape):
        code = unpack(codes[block], columns).view(torch.int8).sub_(ZERO)
        scale_groups_(values[block], code, scale[block], group=GROUP)
    return values
