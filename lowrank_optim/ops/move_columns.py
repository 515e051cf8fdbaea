"""Moving the columns of a matrix."""

from __future__ import annotations

from torch import Tensor


def move_columns_(matrix: Tensor, source: Tensor) -> None:
    """matrix[:, j] = matrix[:, source[j]], or 0 where source[j] is negative.

    Args:
        matrix: (rows, r), modified in place.
        source: int64 (r,).
    """
    matrix.copy_(matrix.index_select(-1, source.clamp_min(0)).masked_fill_(source < 0, 0))
