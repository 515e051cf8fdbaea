"""Linear blockwise int8: 128 neighbours of a row share one fp32 scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 127


def blocks(shape: Sequence[int]) -> int:
    """Scales of a tensor. Blocks end where rows do, so that what becomes of some rows does not depend on the others."""
    return math.prod(shape[:-1]) * -(-shape[-1] // BLOCK)


def _by_block(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (rows, blocks, values of a block) and their scales (rows, blocks), the incomplete blocks by themselves."""
    length = values.shape[-1]
    whole = length // BLOCK
    rows, scales = values.view(-1, length), scale.view(-1, -(-length // BLOCK))
    for part, its in zip(rows.chunk(8), scales.chunk(8)):
        if whole:
            yield part[:, : whole * BLOCK].view(len(part), whole, BLOCK), its[:, :whole]
        if length % BLOCK:
            yield part[:, whole * BLOCK :].unsqueeze(1), its[:, whole:]


def quantize_(codes: Tensor, scale: Tensor, values: Tensor, *, where: Tensor | None = None) -> None:
    """Write ``values`` as codes q and scales s with s = max|x| / 127, q = round(x / s): |x - q s| <= s / 2.

    Thus |q s| <= 2 |x|. Symmetric, so that zeros stay exact: error feedback would add a bias of theirs again in every
    step.

    Args:
        codes: int8, contiguous, in the shape of ``values`` (modified in place).
        scale: fp32 (:func:`blocks`,) (modified in place).
        values: fp32 or wider, real, contiguous, (..., length), length >= 1.
        where: 0-d bool on the same device; False leaves codes and scales as they are.
    """
    for (old, kept), (part, _) in zip(_by_block(codes, scale), _by_block(values, scale)):
        # fp64 values and infinities become the largest that fp32 has, not infinities, of which zeros would make NaN.
        s = (part.abs().amax(-1) / LARGEST).clamp_(max=torch.finfo(torch.float32).max / (LARGEST + 1)).float()
        q = (part / torch.where(s > 0, s, 1).unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        if where is None:
            old.copy_(q)
            kept.copy_(s)
        else:
            old.copy_(torch.where(where, q.to(torch.int8), old))
            kept.copy_(torch.where(where, s, kept))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, in the shape of ``codes``."""
    values = codes.to(dtype)
    for part, s in _by_block(values, scale):
        part.mul_(s.unsqueeze(-1))
    return values
