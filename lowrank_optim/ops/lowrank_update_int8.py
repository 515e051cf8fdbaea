"""The update of an int8 weight by a product of two thin matrices and by its rescaled gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import row_blocks
from lowrank_optim.ops.int8_weight import dequantize_int8_weight, quantize_int8_weight_
from lowrank_optim.ops.lowrank_update import COPIED, move_, rescaled_by


def lowrank_update_int8_(
    codes: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    grad_alpha: float | Tensor = 1.0,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    key: int | Tensor,
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
    columns = codes.shape[1]

    def read(rows: slice) -> Tensor:
        return dequantize_int8_weight(codes[rows], scale[rows], torch.float32)

    for rows, value in moved_rows(
        codes, read, left, right, alpha=alpha, decay=decay, grad=grad, grad_alpha=grad_alpha, row_scale=row_scale,
        column_scale=column_scale,
    ):  # fmt: skip
        quantize_int8_weight_(codes[rows], scale[rows], value, key, start=rows.start * columns)


def moved_rows(
    codes: Tensor, read: Callable[[slice], Tensor], left: Tensor | None, right: Tensor | None,
    *, alpha: float | Tensor, decay: float | Tensor, grad: Tensor | None, grad_alpha: float | Tensor,
    row_scale: Tensor | None, column_scale: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Some rows of a quantized weight after another, moved and not yet rounded, for :func:`lowrank_update_int8_`.

    Args:
        codes: (m, ...), of which ``read`` makes fp32 values (rows, n).
    """
    if left is None or right is None:
        left = right = None
    else:
        left, right = left.float(), right.float()
    if row_scale is None and column_scale is None:
        grad = None
    row_scale, column_scale = rescaled_by(grad_alpha, row_scale, column_scale)
    for _, rows in row_blocks(codes.unsqueeze(0), COPIED):
        value = read(rows)
        row_scales = row_scale if row_scale is None or len(row_scale) == 1 else row_scale[rows]
        left_rows, grad_rows = (tensor if tensor is None else tensor[rows] for tensor in (left, grad))
        move_(value, left_rows, right, alpha, decay, grad_rows, row_scales, column_scale)
        yield rows, value
