"""The update of an int4 weight by a product of two thin matrices and by its rescaled gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.int4_weight import dequantize_int4_weight, quantize_int4_weight_
from lowrank_optim.ops.lowrank_update_int8 import moved_rows


def lowrank_update_int4_(
    codes: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    columns: int,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    grad_alpha: float | Tensor = 1.0,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    key: int | Tensor,
    step: int | Tensor,
) -> None:
    """:func:`lowrank_optim.ops.lowrank_update_int8.lowrank_update_int8_` of a weight in 4 bits.

    Args:
        codes, scale: W (m, n) as :mod:`lowrank_optim.ops.int4_weight` stores it (modified in place).
        columns: n, which the bytes of an odd row do not tell.
        left, right, alpha, decay, grad, grad_alpha, row_scale, column_scale: as there.
        key, step: of the random numbers, see :func:`lowrank_optim.ops.int4_weight.quantize_int4_weight_`.
    """

    def read(rows: slice) -> Tensor:
        return dequantize_int4_weight(codes[rows], scale[rows], columns, torch.float32)

    for rows, value in moved_rows(
        codes, read, left, right, alpha=alpha, decay=decay, grad=grad, grad_alpha=grad_alpha, row_scale=row_scale,
        column_scale=column_scale,
    ):  # fmt: skip
        quantize_int4_weight_(codes[rows], scale[rows], value, key, step=step, start=rows.start * columns)
