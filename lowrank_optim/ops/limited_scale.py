"""What Fira and APOLLO multiply the rows of a gradient with: Adam's lengthening of each, the growth of all limited."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import cast
from lowrank_optim.ops.orthonormal import Sums

# The published guard of both divisions.
GUARD = 1e-8
# A previous norm below this share of the direction's own norm says nothing about the present one.
DEAD = 1e-3


def limited_scale(
    norms: Tensor, grad_norms: Tensor, update_norm: Tensor, *, gamma: float | None, inner: float = 0.0,
    seen: float | Tensor = 1.0, strength: float = 1.0, whole: bool = False, image: Tensor | None = None,
    low: Tensor | None = None, direction: Tensor | None = None, back: float = 0.0, dtype: torch.dtype | None = None,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Scales f of the rows of an update f (G - inner R Pᴴ), and what is to be projected back beside f G::

        phi_i = ||N_i|| / (||R_i|| + 1e-8)             # ``whole``: ||N|| / (||R|| + 1e-8)
        x = seen ||phi (G - inner R Pᴴ)||              # row by row ||g||² - 2 inner ||r||² + inner² ||r Pᴴ||²
        l = 1 / (max(x / (s + 1e-8), gamma) / gamma);  new s = l x
        f = strength l phi
        left = N - back f R

    The residual is never formed. The norm of an update may grow by ``gamma`` a step and fall freely (Fira, arXiv
    2410.01623, section 3.3). A previous norm s that is nearly nothing limits nothing: growth by 1 % from the 1e-8 that
    a zero gradient leaves would take 1600 steps. Where x of any matrix is not finite, every f is 0 and every s stays;
    where f is 0 it does not matter what R holds.

    Args:
        norms: (2, ..., rows), of the rows of R and of N.
        grad_norms: (..., rows, 1), of the rows of G.
        update_norm: s, (...,), 0 where there was none yet.
        gamma: None for no limit.
        seen: a number or a 0-d tensor.
        image: ||r Pᴴ||² (..., rows, 1); None for ||r||², which it is for an orthonormal P.
        low, direction: R and N (..., rows, rank), where ``left`` is wanted; N may be overwritten.
        dtype: of ``left``; None for that of N.
        sums: where all of these are some rows of the whole.

    Returns:
        f (..., rows, 1), the new s (...,), and left, None without ``low``.
    """
    of_low, of_direction = norms.unsqueeze(-1).unbind()
    size = norm_of(of_direction, sums)
    phi = (size / (norm_of(of_low, sums) + GUARD)).expand_as(of_low) if whole else of_direction / (of_low + GUARD)
    outside = grad_norms.square()
    if image is None:
        outside.addcmul_(of_low, of_low, value=inner * (inner - 2))
    else:
        outside.addcmul_(of_low, of_low, value=-2 * inner).add_(image, alpha=inner**2)
    # The difference of nearly equal numbers where hardly anything lies outside: never below zero.
    total = outside.clamp_min_(0).mul_(phi.square()).sum((-2, -1), keepdim=True)
    found = (total if sums is None else sums.sum_(total)).sqrt_().mul_(seen)
    # A comparison is one operation on the device, isfinite() four.
    finite = (found < math.inf).all()
    # A look costs nothing on the CPU, and saves what a mask takes.
    clean = found.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite)
    factor: float | Tensor = strength
    kept = update_norm
    if gamma is not None and clean and update_norm.ndim == 0:
        # Nor do numbers: an operation on one value takes as long as on a thousand.
        norm = found.item()
        growth = excess(norm, update_norm.item(), size.item(), gamma)
        kept, factor = update_norm.new_tensor(norm / growth), strength / growth
    elif gamma is not None:
        previous = update_norm.view(found.shape)
        growth = excess(found, previous, size, gamma)
        limited = found / growth
        kept = torch.where(finite, limited, previous).view(update_norm.shape)
        factor = strength / growth
    scale = phi * factor
    if not clean:
        scale = torch.where(finite, scale, 0)
    if low is None or direction is None:
        return scale, kept, None
    # Zero times NaN is NaN.
    product = None if clean else torch.where(scale != 0, low * scale, 0)
    left = direction.addcmul_(low, scale, value=-back) if product is None else direction.sub_(product, alpha=back)
    return scale, kept, left if dtype is None else cast(left, dtype)


def excess(norm: Any, previous: Any, usual: Any, gamma: float) -> Any:
    """By how much a norm outgrows the previous one times ``gamma``: 1 where it does not, or that was nearly nothing.

    Args:
        norm, previous: (..., 1, 1), or numbers.
        usual: the norm of Adam's direction, the measure of "nearly nothing".
    """
    if not isinstance(norm, Tensor):
        return max(norm / ((previous + GUARD) * gamma), 1.0) if previous > DEAD * usual else 1.0
    growth = (norm / ((previous + GUARD) * gamma)).clamp_min_(1)
    return growth.masked_fill_(previous <= DEAD * usual, 1)


def norm_of(rows: Tensor, sums: Sums | None) -> Tensor:
    """The norm of every matrix, (..., 1, 1), from the norms of its rows, of which a process may have some."""
    if sums is not None:
        return sums.sum_(rows.square().sum((-2, -1), keepdim=True)).sqrt_()
    return torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True)
