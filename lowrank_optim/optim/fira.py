"""Fira: GaLore plus the part of the gradient outside of the subspace, rescaled as Adam rescaled the part inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.norm_scaling import GrowthLimiter
from lowrank_optim.optim.options import Common, arguments, number, one_of
from lowrank_optim.optim.parts import Group, Option, Parts, State, Step, Update
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.subspaces.singular import TopSingular

RESIDUALS = ("reference", "paper")
ADAM = Adam()


class Residual(GrowthLimiter):
    """Project the direction back and add the rescaled residual; see :class:`FiraAdamW` for the two forms."""

    options = {
        **GrowthLimiter.options,
        "alpha": Option(number(), 0.25),
        "residual": Option(one_of(*RESIDUALS), "reference"),
    }

    def update(self, step: Step, state: State, group: Group) -> Update:
        """One product with the basis: a up(N) + f (G - b up(R)) = a up(N - b / a f R) + f G."""
        alpha, paper = group["alpha"], group["residual"] == "paper"
        options: dict[str, Any] = {"inner": alpha, "back": 1.0}
        if paper:
            # The limiter looks at the update after bias correction.
            seen = ADAM.correction(state["step"], group)
            options = {"inner": 1.0, "strength": alpha, "seen": seen, "image": image_norms(step, state, group)}
            # With alpha = 0 there is no f either.
            options["back"] = 1 / alpha if alpha else 0.0
        row_scale, left = self.limited(
            step, state, group, low=step.low, direction=step.direction, dtype=step.grad.dtype, **options
        )
        return Update(left, scale=alpha, row_scale=row_scale)


def image_norms(step: Step, state: State, group: Group) -> Tensor | None:
    """||r Pᴴ||² (..., rows, 1); None where that is ||r||².

    A basis of 16 bits is orthonormal to 2e-3: too little where all of the gradient but that lies inside.
    """
    if torch.finfo(step.grad.dtype).bits >= 32:
        return None
    wide = step.subspace.basis(step.grad, state, group).to(step.low.dtype)
    return ((step.low @ (wide.mT @ wide)) * step.low).sum(-1, keepdim=True)


class FiraAdamW(LowRankOptimizer):
    """GaLore whose update also contains the part of the gradient that the subspace leaves out.

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
        residual: "reference" or "paper"; compared in docs/choosing.md.
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
