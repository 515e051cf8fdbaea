"""Linear blockwise int8: 128 neighbours share one fp32 scale."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 127


def blocks(numel: int) -> int:
    """Scales that ``numel`` values need."""
    return -(-numel // BLOCK)


def _by_block(values: Tensor) -> list[Tensor]:
    """Views (blocks, BLOCK) of a contiguous tensor, an incomplete block at the end by itself."""
    flat = values.view(-1)
    whole = flat.numel() // BLOCK * BLOCK
    parts = [*flat[:whole].view(-1, BLOCK).chunk(8), flat[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


def quantize_(codes: Tensor, scale: Tensor, values: Tensor, *, where: Tensor | None = None) -> None:
    """Write ``values`` as codes q and scales s with s = max|x| / 127, q = round(x / s): |x - q s| <= s / 2.

    Thus |q s| <= 2 |x|. Symmetric, so that zeros stay exact: error feedback would add a bias of theirs again in every
    step.

    Args:
        codes: int8, contiguous, as many as ``values`` (modified in place).
        scale: fp32 (blocks,) (modified in place).
        values: fp32 or wider, real, contiguous.
        where: 0-d bool on the same device; False leaves codes and scales as they are.
    """
    at = 0
    for old, part in zip(_by_block(codes), _by_block(values)):
        absmax = part.abs().amax(1)
        # fp64 values and infinities become the largest that fp32 has, not infinities, of which zeros would make NaN.
        s = (absmax / LARGEST).clamp_(max=torch.finfo(torch.float32).max / (LARGEST + 1)).float()
        q = (part / torch.where(s > 0, s, 1).unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
        kept = scale[at : at + len(s)]
        if where is None:
            old.copy_(q)
            kept.copy_(s)
        else:
            torch.where(where, q.to(torch.int8), old, out=old)
            torch.where(where, s, kept, out=kept)
        at += len(s)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, in the shape of ``codes``."""
    values = codes.to(dtype)
    at = 0
    for part in _by_block(values):
        part.mul_(scale[at : at + len(part)].unsqueeze(1))
        at += len(part)
    return values
