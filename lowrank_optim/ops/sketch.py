"""A random basis for a gradient, and the norms of its rows: what a step needs before it multiplies the two."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.row_norms import row_norms


def sketch(grad: Tensor, rank: int, *, key: int | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A basis of independent real N(0, scale²), and the 2-norms of the gradient's rows.

    Args:
        grad: G (..., rows, d), of any strides.
        rank: columns of the basis.
        key: of the random numbers, an int or a 0-d int32 tensor.
        scale: their standard deviation.

    Returns:
        The basis (..., d, rank) in the dtype of G, as :func:`lowrank_optim.ops.gaussian.gaussian` draws it, and the
        norms (..., rows, 1) in fp32 or wider.
    """
    *batch, _, d = grad.shape
    basis = gaussian(d, rank, key=key, dtype=grad.dtype.to_real(), device=grad.device, batch=batch, scale=scale)
    return basis.to(grad.dtype), row_norms(grad)
