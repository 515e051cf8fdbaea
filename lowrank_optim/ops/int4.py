"""Group-wise 4-bit values, two a byte."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 15


def packed_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the bytes that hold ``rows`` x ``columns`` values; an odd row ends with half a byte unused."""
    return rows, (columns + 1) // 2


def group_count(rows: int, columns: int, group_size: int) -> int:
    """Groups of ``group_size`` consecutive values, row by row, the last one shorter."""
    return -(-rows * columns // group_size)


def pack(codes: Tensor, *, fill: int = 0) -> Tensor:
    """Codes 0..15 (..., columns), uint8, two a byte; ``fill`` stands beside the last one of an odd row."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=fill)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes (..., columns), uint8, that :func:`pack` took."""
    return torch.stack((packed & LARGEST, packed >> 4), dim=-1).flatten(-2)[..., :columns]


def quantize_int4_(codes: Tensor, scale: Tensor, zero: Tensor, values: Tensor, *, group_size: int) -> None:
    """Write ``values`` as (code - zero) * scale with codes 0..15, each to the nearest.

    The range of a group is extended to include 0: otherwise zero points outside 0..15 would be cut off and a group such
    as [1.0, 1.1] would come back as 0.1.

    Args:
        codes: uint8 (..., *:func:`packed_shape`) (modified in place).
        scale: fp32 (..., groups), with :func:`group_count` groups a matrix (modified in place).
        zero: uint8 (..., groups) (modified in place).
        values: (..., rows, columns), real; each matrix of a batch is packed for itself.
    """
    flat = values.flatten(-2).to(torch.float32)
    count = flat.shape[-1]
    padded = torch.nn.functional.pad(flat, (0, -count % group_size))
    groups = padded.view(*values.shape[:-2], -1, group_size)
    low, high = groups.amin(-1).clamp_max_(0), groups.amax(-1).clamp_min_(0)
    torch.div(high - low, LARGEST, out=scale)
    inverse = scale.clamp_min(torch.finfo(scale.dtype).tiny).reciprocal()
    zero.copy_((-low * inverse).round_())
    code = (groups * inverse.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, LARGEST).to(torch.uint8)
    codes.copy_(pack(code.flatten(-2)[..., :count].view(values.shape)))


def dequantize_int4(
    codes: Tensor, scale: Tensor, zero: Tensor, columns: int, *, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The (..., rows, columns) values that :func:`quantize_int4_` wrote, computed in fp32."""
    if codes.is_meta:
        return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)
    code = unpack(codes, columns).to(torch.float32)
    count = code.shape[-2] * columns
    zeros, scales = (t.to(torch.float32).repeat_interleave(group_size, -1)[..., :count] for t in (zero, scale))
    return code.sub_(zeros.reshape(code.shape)).mul_(scales.reshape(code.shape)).to(dtype)
