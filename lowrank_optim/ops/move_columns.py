"""Moving the columns of a matrix."""

from __future__ import annotations

from torch import Tensor


def move_columns_(matrix: Tensor, source: Tensor) -> None:
    """matrix[:, j] = matrix[:, source[j]], or 0 where source[j] is negative; each matrix of a batch for itself.

    Args:
        matrix: (..., rows, r), modified in place.
        source: int64 (..., r).
    """
    places = source.clamp_min(0)
    if source.ndim == 1:
        moved = matrix.index_select(-1, places)
    else:
        moved = matrix.gather(-1, places.unsqueeze(-2).expand_as(matrix))
    matrix.copy_(moved.masked_fill_((source < 0).unsqueeze(-2), 0))
