"""Entries of a matrix product at given positions: sampled dense-dense matrix multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.support import positions

# Rows of G that exist at a time: a quarter, so that the GEMMs stay large and the block stays below a dense weight.
BLOCKS = 4


def sddmm(grad: Tensor, x: Tensor, index: Tensor, row_pointers: Tensor, *, count: int) -> Tensor:
    """out_k = G[i_k, j_k] with G = gradᵀ x, of which a block of rows exists at a time.

    Args:
        grad: (T, m).
        x: (T, n).
        index, row_pointers: the positions, as :mod:`lowrank_optim.ops.support` packs them.
        count: how many positions there are.
    """
    m, n = grad.shape[1], x.shape[1]
    flat = positions(index, row_pointers, (m, n), count)
    out = grad.new_zeros(count)
    size = -(-m // BLOCKS)
    for start in range(0, m, size):
        out = take_rows(out, flat, grad[:, start : start + size].t() @ x, start)
    return out


def take_rows(out: Tensor, flat: Tensor, block: Tensor, first_row: int) -> Tensor:
    """``out`` with the entries of a block of G's rows at their positions, ``flat``, and itself elsewhere."""
    # Every position looks into every block: where a block's positions begin, only the device knows.
    local = flat - first_row * block.shape[1]
    inside = (local >= 0) & (local < block.numel())
    return torch.where(inside, block.view(-1).index_select(0, local.clamp_(0, block.numel() - 1)), out)
