"""Where the stored entries of a sparse matrix stand: drawing, packing and unpacking their positions.

A position is ``row * columns + column``; positions are sorted and unique, so the values of a sparse matrix
have one order whatever the packing. Three packings, the smallest of which is taken:

    flat      index int32 (count,), the positions; int64 from 2^31 matrix entries on
    columns   index uint8 (2 count,), the columns as the bytes of uint16; row_pointers int32 (rows + 1,)
    bitmap    index uint8 (ceil(rows columns / 8),), a bit an entry, lowest bit first

uint16 itself is no dtype of NCCL or gloo: as bytes the index survives DistributedDataParallel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INT32_END = 2**31
UINT16_END = 2**16


def empty_support(shape: tuple[int, int], count: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Unfilled (index, row_pointers) of the smallest packing for ``count`` entries; works on the meta device.

    Where a packing needs no row pointers, they are an empty tensor.
    """
    rows, columns = shape
    wide = torch.int64 if rows * columns >= INT32_END else torch.int32
    pointer = torch.int64 if count >= INT32_END else torch.int32
    sizes = {"flat": wide.itemsize * count, "bitmap": -(-rows * columns // 8)}
    if columns <= UINT16_END:
        sizes["columns"] = 2 * count + pointer.itemsize * (rows + 1)
    packing = min(sizes, key=sizes.__getitem__)
    pointers = torch.empty(rows + 1 if packing == "columns" else 0, dtype=pointer, device=device)
    if packing == "flat":
        return torch.empty(count, dtype=wide, device=device), pointers
    size = 2 * count if packing == "columns" else sizes["bitmap"]
    return torch.empty(size, dtype=torch.uint8, device=device), pointers


def draw_positions(shape: tuple[int, int], count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` sorted distinct positions, every set of them equally likely; int64 on the CPU.

    Without a permutation of the whole matrix, which for a 7B layer takes ten times as long and 0.36 GB:
    draw with replacement until enough are distinct, then drop a uniform choice of the surplus.

    Args:
        shape: (rows, columns).
        count: fewer than rows * columns.
        generator: on the CPU; None takes torch's default one.
    """
    total = shape[0] * shape[1]
    # So many draws leave count distinct ones on average, and the margin makes a second round rare.
    draws = math.ceil(-1.002 * total * math.log1p(-count / total)) + 64
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while found.numel() < count:
        drawn = torch.randint(total, (draws,), generator=generator, dtype=torch.int64, device="cpu")
        found = torch.unique(torch.cat([found, drawn]))
    keep = torch.randperm(found.numel(), generator=generator, device="cpu")[:count]
    return found[keep.sort().values]


def pack_(index: Tensor, row_pointers: Tensor, flat: Tensor, shape: tuple[int, int]) -> None:
    """Write sorted positions into the tensors that :func:`empty_support` made for them."""
    rows, columns = shape
    if index.dtype != torch.uint8:
        index.copy_(flat)
    elif row_pointers.numel():
        column = flat % columns
        index.copy_(torch.stack([column & 0xFF, column >> 8], dim=1).view(-1))
        row_pointers.copy_(torch.searchsorted(flat, torch.arange(rows + 1, device=flat.device) * columns))
    else:
        bits = torch.zeros(8 * index.numel(), dtype=torch.uint8, device=flat.device)
        bits[flat] = 1
        index.copy_((bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1))


def positions(index: Tensor, row_pointers: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """The sorted positions, int32, or int64 where int32 cannot hold them; no shape depends on the data.

    Args:
        index, row_pointers: as :func:`pack_` wrote them.
        shape: (rows, columns).
        count: how many positions there are.
    """
    rows, columns = shape
    if index.dtype != torch.uint8:
        return index
    dtype = torch.int64 if rows * columns >= INT32_END else torch.int32
    if row_pointers.numel():
        low, high = index.view(-1, 2).to(dtype).unbind(1)
        starts = torch.arange(rows, dtype=dtype, device=index.device) * columns
        return torch.repeat_interleave(starts, row_pointers.diff(), output_size=count) + (low | high << 8)
    # The k-th set bit: the byte from a running count of bits, the bit within it from a table.
    bits = torch.arange(256, device=index.device)[:, None] >> torch.arange(8, device=index.device) & 1
    ones = bits.sum(1).to(dtype)[index.int()]
    ends = ones.cumsum(0, dtype=dtype)
    order = torch.arange(count, dtype=dtype, device=index.device)
    byte = torch.searchsorted(ends, order, right=True, out_int32=dtype == torch.int32)
    within = order - (ends - ones)[byte]
    bit_of = bits.argsort(dim=1, descending=True, stable=True).to(dtype)
    return 8 * byte + bit_of[index[byte].int(), within]
