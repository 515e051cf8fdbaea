"""The formats of quantized weights: int8 and int4 codes with a scale for every group of neighbours in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops import int4_weight, int8_weight
from lowrank_optim.ops.int4 import packed_shape


class Format(NamedTuple):
    """What a weight (m, n) is stored as.

    Attributes:
        dtype: of the codes.
        codes_shape, scale_shape: (m, n) to the shapes of codes and fp32 scales.
        quantize_: (codes, scale, values), and what the operation takes to round stochastically.
        dequantize: (codes, scale, n, dtype) to the values.
    """

    dtype: torch.dtype
    codes_shape: Callable[[int, int], tuple[int, int]]
    scale_shape: Callable[[int, int], tuple[int, int]]
    quantize_: Callable[..., None]
    dequantize: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]


def _dequantize_int8(codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return int8_weight.dequantize_int8_weight(codes, scale, dtype)


INT8 = Format(
    torch.int8, lambda rows, columns: (rows, columns), int8_weight.scale_shape, int8_weight.quantize_int8_weight_,
    _dequantize_int8,
)  # fmt: skip
INT4 = Format(
    torch.uint8, packed_shape, int4_weight.scale_shape, int4_weight.quantize_int4_weight_,
    int4_weight.dequantize_int4_weight,
)  # fmt: skip
FORMATS = {format.dtype: format for format in (INT8, INT4)}
