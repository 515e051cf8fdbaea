"""Fira: GaLore plus the part of the gradient outside of the subspace, rescaled as Adam rescaled the part inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.orthonormal import Sums
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.norm_scaling import GrowthLimiter, factors
from lowrank_optim.optim.options import Common, arguments, number, one_of
from lowrank_optim.optim.parts import Group, Norms, Option, Parts, State, Step, Update
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.subspaces.singular import TopSingular

RESIDUALS = ("reference", "paper")
ADAM = Adam()


def residual_norm(
    phi: Tensor, norms: Norms, inner: float, image: Tensor | None = None, sums: Sums | None = None
) -> Tensor:
    """||phi (G - inner R Pᴴ)|| of every matrix, (..., 1, 1), from the norms of rows: the residual is never formed.

    With R = G P, row by row ||g - inner r Pᴴ||² = ||g||² - 2 inner ||r||² + inner² ||r Pᴴ||².

    Args:
        image: ||r Pᴴ||² (..., rows, 1); None for ||r||², which it is for an orthonormal P.
        sums: where the rows are those of one process.
    """
    inside = norms.low.square()
    image = inside if image is None else image
    # The difference of nearly equal numbers where hardly anything lies outside: never below zero.
    outside = (norms.grad.square() - 2 * inner * inside + inner**2 * image).clamp_min_(0)
    total = (phi.square() * outside).sum((-2, -1), keepdim=True)
    return (total if sums is None else sums.sum_(total)).sqrt()


class Residual(GrowthLimiter):
    """Project the direction back and add the rescaled residual; see :class:`FiraAdamW` for the two forms."""

    options = {
        **GrowthLimiter.options,
        "alpha": Option(number(), 0.25),
        "residual": Option(one_of(*RESIDUALS), "reference"),
    }

    def update(self, step: Step, state: State, group: Group) -> Update:
        """One product with the basis: up(a N) + f (G - b up(R)) = up(a N - b f R) + f G."""
        assert step.norms is not None
        alpha, paper = group["alpha"], group["residual"] == "paper"
        inner = 1.0 if paper else alpha
        scaling = factors(step.norms, step.sums)
        image = None
        if paper and torch.finfo(step.grad.dtype).bits < 32:
            # A basis of 16 bits is orthonormal to 2e-3: too little where all of the gradient but that lies inside.
            wide = step.subspace.basis(step.grad, state, group).to(step.low.dtype)
            image = ((step.low @ (wide.mT @ wide)) * step.low).sum(-1, keepdim=True)
        norm = residual_norm(scaling.phi, step.norms, inner, image, step.sums)
        # In the paper the limiter looks at the update after bias correction.
        seen = norm * ADAM.correction(state["step"], group) if paper else norm
        row_scale = scaling.phi * self.limit(seen, scaling.direction, state, group)
        if paper:
            row_scale = row_scale * alpha
        low = step.direction.mul_(alpha).addcmul_(step.low, row_scale, value=-inner)
        return Update(low, row_scale=row_scale)


class FiraAdamW(LowRankOptimizer):
    """GaLore whose update also has the part of the gradient that the subspace leaves out.

    P, R, N and the bias correction c are those of :class:`GaLoreAdamW` on a weight W (m, n), n <= m (else on its
    transpose). ``residual="reference"``, as the authors' code::

        phi_i = ||N_i|| / (||R_i|| + 1e-8)             # one factor a row of R: a channel of the larger side
        S = phi (G - alpha R Pᵀ)
        S = S / (max(||S|| / (s + 1e-8), gamma) / gamma);  s = ||S||
        W = W - lr c (alpha N Pᵀ + S)
        W = (1 - lr weight_decay) W

    ``residual="paper"``, as algorithm 1: S = phi (G - R Pᵀ), the limiter looks at c ||S||, and the update is
    lr c alpha (N Pᵀ + S). With alpha = 0.25 its residual moves four times slower, so the two want different lr.

    Args:
        params: as for :class:`GaLoreAdamW`; the published groups carry ``rank, update_proj_gap, alpha, proj_type``.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two refreshes of P, >= 1.
        alpha: factor of the part inside the subspace ("paper": of both), >= 0.
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns.
        limiter_gamma: how much ||S|| may grow in a step, >= 1; None is no limit.
        residual: "reference" or "paper".
        refresh: "power", "randomized" or "svd", as for :class:`GaLoreAdamW`.
        moments: "keep" (as published), "align" or "rotate", as for :class:`GaLoreAdamW`.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Chen et al. 2024 (arXiv 2410.01623), algorithm 1.

    Deviations: P as for :class:`GaLoreAdamW`; ``refresh="svd"`` reproduces the published trajectories. The limiter
    passes an update whose predecessor was nearly nothing (s <= ||N|| / 1000), where the published one lets a layer
    with one zero gradient stand still for 1600 steps. Convolutions are matrices (out, in * kernel);
    ``proj_type="full"`` (a crash in the published code) is refused. ``residual="paper"`` adds eps where the code does.
    """

    triple = Parts(TopSingular(), ADAM, Residual())

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: str = "std",
        limiter_gamma: float | None = 1.01,
        residual: str = "reference",
        refresh: str = "power",
        moments: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
