"""Blockwise 8-bit values in bitsandbytes' dynamic format, with torch alone.

A value is ``map[code] * scale``: one uint8 code each, one fp32 scale (the largest magnitude) for every 256 consecutive
values. The map has a dynamic exponent: seven decades, denser towards the large values.
Source: Dettmers et al. 2022 (arXiv 2110.02861), section 2; the numbers are those of bitsandbytes 0.50.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7

# Of a smaller scale the smallest code would stand for a number that fp32 does not have; the inverse of a larger one
# would be such a number. (The smallest normal number is 2^-126, the smallest code 2^-21.6.)
LEAST_SCALE, GREATEST_SCALE = 2.0**-104, 2.0**126


def _ascending_codes(signed: bool) -> Tensor:
    values = [0.0, 1.0]
    for exponent in range(DECADES):
        # The larger the decade, the more of the bits are left for the fraction.
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        decade = (10 ** (exponent - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += decade
        if signed:
            values += [-value for value in decade]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _search_table(codes: Tensor) -> tuple[Tensor, Tensor]:
    """For each code its upper bound, and for the upper 16 bits of a float the smallest code it may have.

    Two neighbouring bounds are further apart than floats with the same upper 16 bits, so that one comparison decides
    between the two codes that are left; five times as fast as a binary search over the bounds on a CPU.
    """
    bounds = (codes[:-1] + codes[1:]) / 2
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu") << 16
    # The number nearest to minus infinity among those with these upper bits.
    lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    table = torch.bucketize(lowest, bounds, out_int32=True)
    return torch.cat((bounds, torch.tensor([torch.inf], dtype=torch.float32, device="cpu"))), table


# Made at import, not at the first step: under torch.compile that would be part of the graph.
_CPU = torch.device("cpu")
_TABLES = {
    _CPU: {signed: (codes := _ascending_codes(signed), *_search_table(codes)) for signed in (True, False)},
}


def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the format in ascending order, fp32, within [-1, 1] or [0, 1]."""
    return search_tables(device)[signed][0]


def search_tables(device: torch.device) -> dict[bool, tuple[Tensor, Tensor, Tensor]]:
    """For signed and unsigned values: the map, the bounds, and the search table."""
    if device not in _TABLES:
        _TABLES[device] = {
            signed: (codes.to(device), bounds.to(device), table.to(device))
            for signed, (codes, bounds, table) in _TABLES[_CPU].items()
        }
    return _TABLES[device]


def quantize_(codes: Tensor, scale: Tensor, values: Tensor, *, signed: bool) -> None:
    """Write ``values`` into ``codes`` and ``scale``, each to the nearest code (the lower one in the middle).

    Unsigned, a positive value never becomes zero: what is nearest to zero takes the smallest positive code. A second
    moment of zero beside a first one that is not would make a step of M / eps.

    Args:
        codes: uint8, contiguous, n values of any shape (modified in place).
        scale: fp32 (ceil(n / 256),) (modified in place), kept within [2^-104, 2^126].
        values: any real dtype, shape of ``codes``; infinite ones become the largest code.
        signed: whether values may be negative.
    """
    flat = values.reshape(-1).to(torch.float32)
    n = flat.numel()
    # Padding copies, even by nothing.
    blocks = (torch.nn.functional.pad(flat, (0, -n % BLOCK)) if n % BLOCK else flat).view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=scale)
    scale.clamp_(LEAST_SCALE, GREATEST_SCALE)
    normal = (blocks * scale.reciprocal().unsqueeze(1)).clamp_(-1, 1).view(-1)[:n]
    _, bounds, table = search_tables(codes.device)[signed]
    code = table.index_select(0, (normal.view(torch.int32) >> 16).add_(2**15))
    code += normal > bounds.index_select(0, code)
    if not signed:
        # By the value as it came: its share of the scale may be less than fp32 can hold.
        torch.maximum(code, values.reshape(-1) > 0, out=code)
    codes.copy_(code.view(codes.shape))


def dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The fp32 values that ``codes`` and ``scale`` stand for, in the shape of ``codes``."""
    n = codes.numel()
    values = dynamic_map(signed, codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
    whole = n - n % BLOCK
    values[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK].unsqueeze(1))
    values[whole:].mul_(scale[whole // BLOCK :])
    return values.view(codes.shape)
