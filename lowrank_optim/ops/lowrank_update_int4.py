"""The update of an int4 weight by a product of two thin matrices and by its rescaled gradient."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.lowrank_update_int8 import Move, update_stored_
from lowrank_optim.ops.quantized_weight import INT4


def lowrank_update_int4_(
    codes: Tensor, scale: Tensor, left: Tensor | None, right: Tensor | None, *, columns: int, key: int | Tensor,
    step: int | Tensor, **move: Unpack[Move],
) -> None:  # fmt: skip
    """:func:`lowrank_optim.ops.lowrank_update_int8.lowrank_update_int8_` of a weight in 4 bits.

    Args:
        codes, scale: W (m, n) as :mod:`lowrank_optim.ops.int4_weight` stores it (modified in place).
        columns: n, which the bytes of an odd row do not tell.
        left, right, alpha, decay, grad, grad_alpha, row_scale, column_scale: as there.
        key, step: of the random numbers, see :func:`lowrank_optim.ops.int4_weight.quantize_int4_weight_`.
    """
    update_stored_(INT4, codes, scale, left, right, columns, {"key": key, "step": step}, **move)
