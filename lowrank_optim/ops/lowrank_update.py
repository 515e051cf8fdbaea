"""The update of a weight by a product of two thin matrices and by its rescaled gradient, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import NARROW, as_batch, cast, row_blocks
from lowrank_optim.ops.rounding import Positions, advanced, join_24_bits, round_to_bfloat16, split_24_bits

# Values of a working copy on a CPU. A product with fewer rows at a time packs its other operand too often.
COPIED = 2**20


def lowrank_update_(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    decay: float | Tensor = 1.0,
    grad: Tensor | None = None,
    grad_alpha: float | Tensor = 1.0,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    key: int | Tensor | None = None,
    correction: Tensor | None = None,
    start: int | Positions = 0,
) -> None:
    """Move a weight, or a batch of weights, once::

        W = decay W + alpha left rightᴴ + grad_alpha row_scale ∘ grad ∘ column_scale

    Nothing of the weight's size is made on the way. Weights of 16 bits are computed in fp32, some rows at a time, and
    rounded once; others are moved in place.

    Args:
        weight: W (..., m, n) of any strides (modified in place); each matrix of a batch for itself.
        left, right: (..., m, rank) and (..., n, rank), one of them a basis; either None for no product. They enter in
            the weight's dtype, as matrix units take them.
        alpha, decay, grad_alpha: real numbers or one-element tensors, the same for all matrices.
        grad: (..., m, n).
        row_scale: (..., m, 1), or (..., 1, 1) for one number a matrix; None for 1.
        column_scale: (..., 1, n); None for 1. With neither there is no gradient term. Where a scale is 0 it does not
            matter what the gradient holds.
        key: round a bfloat16 weight stochastically with this key, see :func:`lowrank_optim.ops.rounding.random_bits`;
            None rounds to nearest. The counter is the position in a contiguous weight.
        correction: int8 (..., m, n), contiguous (modified in place): the bfloat16 weight is
            :func:`lowrank_optim.ops.rounding.join_24_bits` of the two; takes a key.
        start: position of the first element, or of all, where the weight is a part of a larger one; runs are rows or
            whole matrices.

    Raises:
        ValueError: a key or a correction for a weight that is not bfloat16; leading axes that are no batch.
    """
    rounds = key is not None or correction is not None
    if rounds and weight.dtype != torch.bfloat16:
        raise ValueError(f"Invalid weight: {weight.dtype}, expected torch.bfloat16 with a key or a correction")
    if left is None or right is None:
        left = right = None
    if row_scale is None and column_scale is None:
        grad = None
    # Few CPUs multiply 16 bits: elsewhere torch takes 10 times as long as by way of fp32. A factor on the device would
    # have to be rounded into a side.
    product_only = grad is None and not isinstance(alpha, Tensor) and not isinstance(decay, Tensor)
    in_place = not rounds and (weight.dtype not in NARROW or (product_only and weight.device.type != "cpu"))
    if in_place and product_only and left is not None and right is not None and weight.ndim == 2:
        beta, alpha = float(decay), float(alpha)
        weight.addmm_(cast(left, weight.dtype), cast(right, weight.dtype).mH, beta=beta, alpha=alpha)
        return
    if left is not None and right is not None:
        left, right = cast(left, weight.dtype), cast(right, weight.dtype)
    row_scale, column_scale = rescaled_by(grad_alpha, row_scale, column_scale)
    if in_place and weight.ndim == 2:
        move_(weight, left, right, alpha, decay, grad, row_scale, column_scale)
        return
    batch = as_batch("weight", weight)
    left, right = _matrices(left=left, right=right)
    grad, row_scale, column_scale = _matrices(grad=grad, row_scale=row_scale, column_scale=column_scale)
    if in_place:
        move_(batch, left, right, alpha, decay, grad, row_scale, column_scale)
        return
    left, right = (None if side is None else side.to(torch.float32) for side in (left, right))
    corrections = None if correction is None else as_batch("correction", correction)
    _, m, n = batch.shape
    for matrices, rows in row_blocks(batch, COPIED):
        part = batch[matrices, rows]
        if corrections is None:
            value = part.to(torch.float32, memory_format=torch.contiguous_format)
        else:
            value = join_24_bits(part.contiguous(), corrections[matrices, rows])
        move_(
            value,
            None if left is None else left[matrices, rows],
            None if right is None else right[matrices],
            alpha,
            decay,
            None if grad is None else grad[matrices, rows],
            _rows_of(row_scale, matrices, rows),
            None if column_scale is None else column_scale[matrices],
        )
        here = advanced(start, (matrices.start * m + rows.start) * n)
        if corrections is not None:
            value, low = split_24_bits(value, 0 if key is None else key, here)
            corrections[matrices, rows].copy_(low)
        elif key is not None:
            value = round_to_bfloat16(value, key, here)
        part.copy_(value)


def move_(
    value: Tensor, left: Tensor | None, right: Tensor | None, alpha: float | Tensor, decay: float | Tensor,
    grad: Tensor | None, row_scale: Tensor | None, column_scale: Tensor | None,
) -> None:  # fmt: skip
    """:func:`lowrank_update_` of (m, n) or (matrices, m, n) in their own dtype; ``left`` and ``right`` have it too."""
    alpha, decay = _number(alpha), _number(decay)
    if left is None or right is None:
        if isinstance(decay, Tensor) or decay != 1:
            value.mul_(decay)
    else:
        if isinstance(alpha, Tensor) or isinstance(decay, Tensor):
            value.mul_(decay)
            left, alpha, decay = (left * alpha).to(value.dtype), 1.0, 1.0
        if value.ndim == 2:
            value.addmm_(left, right.mH, beta=decay, alpha=alpha)
        elif len(value) == 1:
            value[0].addmm_(left[0], right[0].mH, beta=decay, alpha=alpha)
        else:
            value.baddbmm_(left, right.mH, beta=decay, alpha=alpha)
    if grad is not None:
        _add_gradient_(value, grad, row_scale, column_scale)


def _add_gradient_(value: Tensor, grad: Tensor, row_scale: Tensor | None, column_scale: Tensor | None) -> None:
    """value += row_scale ∘ grad ∘ column_scale."""
    row_scale, column_scale = (None if x is None else cast(x, value.dtype) for x in (row_scale, column_scale))
    scales = [scale for scale in (row_scale, column_scale) if scale is not None]
    # A look costs nothing on the CPU, and a pass without a mask is 5 times as fast.
    masks = value.device.type != "cpu" or torch.compiler.is_compiling() or not all(bool(x.all()) for x in scales)
    if not masks and len(scales) == 1 and grad.dtype == value.dtype:
        value.addcmul_(grad, scales[0])
        return
    value, grad = as_batch("value", value), as_batch("grad", grad)
    row_scale, column_scale = _matrices(row_scale=row_scale, column_scale=column_scale)
    for matrices, rows in row_blocks(value):
        part = grad[matrices, rows]
        beside = (_rows_of(row_scale, matrices, rows), None if column_scale is None else column_scale[matrices])
        for scale in beside:
            if scale is not None:
                product = part * scale
                # Zero times NaN is NaN.
                part = torch.where(scale != 0, product, 0) if masks else product
        value[matrices, rows].add_(part)


def rescaled_by(
    factor: float | Tensor, row_scale: Tensor | None, column_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both scales of a gradient, one of them times a factor."""
    if not isinstance(factor, Tensor) and factor == 1:
        return row_scale, column_scale
    if row_scale is not None:
        return row_scale * factor, column_scale
    return None, None if column_scale is None else column_scale * factor


def _rows_of(row_scale: Tensor | None, matrices: slice, rows: slice) -> Tensor | None:
    """The scales of some rows; one number a matrix serves all of them."""
    if row_scale is None:
        return None
    return row_scale[matrices] if row_scale.shape[1] == 1 else row_scale[matrices, rows]


def _matrices(**tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else as_batch(name, tensor) for name, tensor in tensors.items()]


def _number(value: float | Tensor) -> float | Tensor:
    """A tensor on the CPU costs nothing to read; one on another device would make the host wait."""
    known = isinstance(value, Tensor) and value.device.type == "cpu" and not torch.compiler.is_compiling()
    return float(value) if known else value
