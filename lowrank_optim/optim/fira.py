"""Fira: GaLore plus the part of the gradient outside of the subspace, rescaled as Adam rescaled the part inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.fused import Norms, Terms
from lowrank_optim.optim.galore import TopSingular
from lowrank_optim.optim.protocols import Group, State, Subspace
from lowrank_optim.optim.rules import Adam
from lowrank_optim.optim.scaling import Factors, GrowthLimiter, add_terms_, factors, on_host, row_norms

RESIDUALS = ("reference", "paper")
ADAM = Adam()


def residual_norm(scaling: Factors, grad: Tensor, inner: float, image: Tensor | None = None) -> Tensor:
    """||phi (G - inner R Pᴴ)||, 0-d, from the norms of rows: the residual itself is never formed.

    With R = G P, row by row ||g - inner r Pᴴ||² = ||g||² - 2 inner ||r||² + inner² ||r Pᴴ||².

    Args:
        scaling: of R.
        grad: norms of the rows of G, (rows, 1).
        image: ||r Pᴴ||², (rows, 1); None where P is orthonormal, so that it is ||r||².
    """
    # The difference of nearly equal numbers where hardly anything lies outside: never below zero.
    if image is None:
        outside = grad.square() - inner * (2 - inner) * scaling.low.square()
    else:
        outside = grad.square() - 2 * inner * scaling.low.square() + inner**2 * image
    return (scaling.phi.square() * outside.clamp_min(0)).sum().sqrt()


def inner_share(group: Group) -> float:
    """How much of R Pᴴ the residual G - inner R Pᴴ lacks."""
    return float(group["alpha"]) if group["residual"] == "reference" else 1.0


class Residual(GrowthLimiter):
    """Lift the direction and add the rescaled residual; see :class:`FiraAdamW` for the two forms."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on a negative alpha, an unknown residual, or what the limiter refuses."""
        super().validate(group)
        check_range("alpha", group["alpha"], low=0.0)
        check_choice("residual", group["residual"], RESIDUALS)

    def factor(self, norm: Tensor, scaling: Factors, state: State, group: Group) -> Tensor:
        """What multiplies the residual, (rows, 1): phi, limited, in "paper" times alpha."""
        paper = group["residual"] == "paper"
        # There the limiter looks at the update after bias correction.
        seen = norm * ADAM.correction(state["step"], group) if paper else norm
        release = self.limit(seen, scaling.direction, state, group)
        return scaling.phi * (release * group["alpha"] if paper else release)

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """One product with the basis where it is orthonormal: up(a N) + f (G - b up(R)) = up(a N - b f R) + f G."""
        if torch.finfo(state["basis"].dtype).bits >= 32:
            norms = Norms(row_norms(low), row_norms(direction), row_norms(grad))
            terms = self.terms(low, direction, state["basis"], norms, state, group, alpha=alpha)
            add_terms_(target, grad, terms, subspace, state, group)
            return
        scaling = factors(row_norms(low), row_norms(direction))
        # In bfloat16 the basis is orthonormal to 2e-3 and R good to 2^-9, too little for the difference of two norms
        # or of two large updates. So here the residual is formed, and what it becomes is added to the weight once.
        update = grad.clone()
        subspace.add_up_(update, low, state, group, alpha=-inner_share(group))
        norm = torch.linalg.vector_norm(scaling.phi * row_norms(update))
        factor = self.factor(norm, scaling, state, group) * alpha
        update.mul_(factor)
        if not on_host(grad):
            update.masked_fill_(factor == 0, 0)
        subspace.add_up_(update, direction * (group["alpha"] * alpha), state, group, alpha=1.0)
        target.add_(update)

    def terms(
        self, low: Tensor, direction: Tensor, basis: Tensor, norms: Norms, state: State, group: Group,
        *, alpha: float | Tensor,
    ) -> Terms:  # fmt: skip
        """One product with the basis: up(a N) + f (G - b up(R)) = up(a N - b f R) + f G, with R in fp32 or wider.

        ``direction`` is used up.
        """
        scaling = factors(norms.low, norms.direction)
        inner, image = inner_share(group), None
        if torch.finfo(basis.dtype).bits < 32:
            wide = basis.to(low.dtype)
            image = ((low @ (wide.mT @ wide)) * low).sum(-1, keepdim=True)
        norm = residual_norm(scaling, norms.grad, inner, image)
        factor = self.factor(norm, scaling, state, group) * alpha
        return Terms(direction.mul_(group["alpha"] * alpha).addcmul_(low, factor, value=-inner), 1.0, factor)


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
        stagger: spread the refreshes of the parameters over the gap instead of one step for all.
        state_dtype: storage of the moments: "float32", "bfloat16" (stochastically rounded) or "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Chen et al. 2024 (arXiv 2410.01623), algorithm 1.

    Deviations: P as for :class:`GaLoreAdamW`; ``refresh="svd"`` reproduces the published trajectories. The limiter
    passes an update whose predecessor was nearly nothing (s <= ||N|| / 1000), where the published one lets a layer
    with one zero gradient stand still for 1600 steps. Only matrices are compressed; ``proj_type="full"`` (a crash in
    the published code) is refused. ``residual="paper"`` keeps the code's place of eps.
    """

    subspace = TopSingular()
    rule = ADAM
    lift = Residual()

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
        stagger: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "alpha": alpha,
                "proj_type": proj_type,
                "limiter_gamma": limiter_gamma,
                "residual": residual,
                "refresh": refresh,
                "moments": moments,
                "stagger": stagger,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )
