"""Selecting columns of a matrix by their norms."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops.chunks import column_norms


def dct_select(scored: Tensor, rank: int, *, ell_norm: int) -> Tensor:
    """The ``rank`` columns of greatest 1- or 2-norm, int64 (..., rank), ascending; of equals the first.

    The 2-norm keeps the most energy: what is left of a matrix is at most 1 - rank / d of it.

    Args:
        scored: (..., rows, d), fp32 or wider.
        rank: at most d.
        ell_norm: 1 or 2.
    """
    return greatest(column_norms(scored, ell_norm), rank)


def greatest(scores: Tensor, count: int) -> Tensor:
    """The places along the last axis of the ``count`` greatest, ascending; of equals the first."""
    # topk leaves the order of equals to the device.
    order = scores.sort(descending=True, stable=True).indices
    return order[..., :count].sort().values
