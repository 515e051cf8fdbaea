"""The update of an int8 weight by a product of two thin matrices and by its rescaled gradient."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.chunks import row_blocks
from lowrank_optim.ops.lowrank_update import COPIED, move_, rescaled_by
from lowrank_optim.ops.quantized_weight import INT8, Format


class Move(TypedDict, total=False):
    """How a weight moves, as :func:`lowrank_update_int8_` explains it."""

    alpha: float | Tensor
    decay: float | Tensor
    grad: Tensor | None
    grad_alpha: float | Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None


def lowrank_update_int8_(
    codes: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None, *, key: int | Tensor, **move: Unpack[Move]
) -> None:
    """Move a weight once, computing in fp32 some rows at a time, and round it stochastically to codes of new scales::

        W = decay W + alpha left rightᵀ + grad_alpha row_scale ∘ grad ∘ column_scale

    Args:
        codes, scale: W (m, n) as :mod:`lowrank_optim.ops.int8_weight` stores it (modified in place).
        left, right: (m, rank) and (n, rank), one of them a basis; either None for no product.
        alpha, decay, grad_alpha: numbers or one-element tensors.
        grad: (m, n).
        row_scale: (m, 1), or (1, 1) for one number; None for 1.
        column_scale: (1, n); None for 1. With neither there is no gradient term. Where a scale is 0 it does not matter
            what the gradient holds.
        key: of the random bits, see :func:`lowrank_optim.ops.rounding.random_bits`.
    """
    update_stored_(INT8, codes, scale, left, right, codes.shape[1], {"key": key}, **move)


def update_stored_(
    stored: Format, codes: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None, columns: int,
    random: dict[str, int | Tensor], *, alpha: float | Tensor = 1.0, decay: float | Tensor = 1.0,
    grad: Tensor | None = None, grad_alpha: float | Tensor = 1.0, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`lowrank_update_int8_` of a weight (m, ``columns``) in any format, rounded with ``random``."""
    if left is None or right is None:
        left = right = None
    else:
        left, right = left.float(), right.float()
    if row_scale is None and column_scale is None:
        grad = None
    row_scale, column_scale = rescaled_by(grad_alpha, row_scale, column_scale)
    for _, rows in row_blocks(codes.unsqueeze(0), COPIED):
        value = stored.dequantize(codes[rows], scale[rows], columns, torch.float32)
        row_scales = row_scale if row_scale is None or len(row_scale) == 1 else row_scale[rows]
        left_rows, grad_rows = (tensor if tensor is None else tensor[rows] for tensor in (left, grad))
        move_(value, left_rows, right, alpha, decay, grad_rows, row_scales, column_scale)
        stored.quantize_(codes[rows], scale[rows], value, start=rows.start * columns, **random)
