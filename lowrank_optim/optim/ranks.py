"""A rank for every matrix, from how fast its singular values fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lowrank_optim.optim.roles import HIDDEN, roles
from lowrank_optim.optim.validation import check_positive_int


def allocate_ranks(
    source: nn.Module | Mapping[str, Tensor], budget: int, *, cost: Callable[[tuple[int, int]], float] = sum
) -> dict[str, int]:
    """Ranks that together cost what a uniform one does, high where singular values fall slowly::

        x = (σ - min σ) / (max σ - min σ)        # for every matrix, so that scales do not matter
        rank of a matrix = number of its x that are at least τ, at least 1

    with the lowest threshold τ, the same for all, whose ranks keep within the budget.

    :func:`lowrank_optim.low_rank_groups` takes the result as ``rank`` of any optimizer that projects gradients, and
    :func:`lowrank_optim.nn.convert` as ``ranks`` of a parameterization.

    Args:
        source: gradients, or other matrices (m, n), by the name of their parameter, such as
            ``{name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.ndim == 2}``; of a
            model, the weights of its hidden matrices (:mod:`lowrank_optim.optim.roles`).
        budget: the uniform rank, at least 1. No rank exceeds the smaller side of its matrix.
        cost: what one rank of a matrix (m, n) costs. m + n by default, as for its factors; for GaLore's basis and
            moments ``lambda shape: min(shape) + 2 * max(shape)``.

    Raises:
        ValueError: a budget out of range, no matrices, or one that is not finite or not of two dimensions.

    Source: WeLore, Jaiswal et al. 2024 (arXiv 2407.11239), section 3.

    Deviations: the published threshold meets a mean rank, by a search in steps of 0.005; here it meets a memory.
    The paper motivates the ranks of weights by gradients and computes them from weights alone; here either serves.
    """
    check_positive_int("budget", budget)
    matrices = _hidden_matrices(source) if isinstance(source, nn.Module) else dict(source)
    if not matrices:
        raise ValueError("Invalid source: no matrices, expected at least one")
    shares = {name: _normalized_spectrum(name, matrix) for name, matrix in matrices.items()}
    costs = {name: float(cost((matrix.shape[0], matrix.shape[1]))) for name, matrix in matrices.items()}
    allowed = sum(costs[name] * min(budget, len(x)) for name, x in shares.items())
    every = torch.cat(list(shares.values()))
    each = torch.cat([torch.full((len(x),), costs[name], dtype=torch.float64) for name, x in shares.items()])
    order = every.argsort(descending=True, stable=True)
    thresholds, spent = every[order], each[order].cumsum(0)
    # Equal values come together or not at all, so that equal spectra get equal ranks.
    last = torch.cat((thresholds[1:] != thresholds[:-1], torch.tensor([True])))
    fits = last & (spent <= allowed * (1 + 1e-12))
    # Where spectra are flat, even all values that are 1 may cost too much.
    lowest = thresholds[fits][-1] if fits.any() else torch.inf
    return {name: max(1, int((x >= lowest).sum())) for name, x in shares.items()}


def _hidden_matrices(model: nn.Module) -> dict[str, Tensor]:
    known = roles(model)
    return {name: p.detach() for name, p in model.named_parameters() if known[name] in HIDDEN and p.ndim == 2}


def _normalized_spectrum(name: str, matrix: Tensor) -> Tensor:
    """The singular values in descending order, from 1 to 0 on the CPU in fp64; all 1 where they are equal."""
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"Invalid source: {name!r} has the shape {tuple(matrix.shape)}, expected a matrix")
    if not matrix.isfinite().all():
        raise ValueError(f"Invalid source: {name!r} is not finite")
    singular = torch.linalg.svdvals(matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)))
    singular = singular.to("cpu", torch.float64)
    width = singular[0] - singular[-1]
    return (singular - singular[-1]) / width if width > 0 else torch.ones_like(singular)
