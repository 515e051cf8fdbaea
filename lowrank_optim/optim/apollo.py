"""APOLLO: the raw gradient, rescaled channel by channel as Adam would rescale a random sketch of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.fused import Norms, Terms
from lowrank_optim.optim.galore import TopSingular
from lowrank_optim.optim.protocols import Group, State, Subspace
from lowrank_optim.optim.random_bases import Gaussian
from lowrank_optim.optim.rules import Adam
from lowrank_optim.optim.scaling import GrowthLimiter, add_terms_, factors, row_norms

PROJECTIONS = ("random", "svd")
SCALE_TYPES = ("channel", "tensor")
TOP = TopSingular()


class Scaling(GrowthLimiter):
    """W += alpha sqrt(scale) phi G, its growth limited; nothing is lifted."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on a negative scale, an unknown proj or scale_type, or what the limiter refuses."""
        super().validate(group)
        check_range("scale", group["scale"], low=0.0)
        check_choice("proj", group["proj"], PROJECTIONS)
        check_choice("scale_type", group["scale_type"], SCALE_TYPES)

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """One pass over the gradient for its norms, one for the weight."""
        norms = Norms(row_norms(low), row_norms(direction), row_norms(grad))
        terms = self.terms(low, direction, None, norms, state, group, alpha=alpha)
        add_terms_(target, grad, terms, subspace, state, group)

    def terms(
        self, low: Tensor, direction: Tensor, basis: Tensor | None, norms: Norms, state: State, group: Group,
        *, alpha: float | Tensor,
    ) -> Terms:  # fmt: skip
        """The gradient alone; the norms are all that low and direction are for."""
        scaling = factors(norms.low, norms.direction, whole=group["scale_type"] == "tensor")
        strength = group["scale"] ** 0.5
        norm = torch.linalg.vector_norm(scaling.phi * norms.grad)
        if group["scale_front"]:
            norm = norm * strength
        release = self.limit(norm, scaling.direction, state, group)
        return Terms(factor=scaling.phi * (release * strength * alpha))


class APOLLOAdamW(LowRankOptimizer):
    """The raw gradient with the step sizes that Adam takes in a random low-rank sketch of it.

    For a weight W (m, n), n <= m (else on its transpose), with gradient G and a sketch P (n, rank) of independent
    N(0, 1/rank), drawn anew at updates 1, 1 + gap, 1 + 2 gap, ... ::

        R = G P                                        # (m, rank)
        M, V, N = Adam's moments and direction on R    # as in GaLoreAdamW, bias correction c apart
        phi_i = ||N_i|| / (||R_i|| + 1e-8)             # a row of R; "tensor": ||N|| / (||R|| + 1e-8)
        S = phi G
        S = S / (max(||S|| / (s + 1e-8), gamma) / gamma);  s = ||S||
        W = W - lr c sqrt(scale) S
        W = (1 - lr weight_decay) W

    P is not stored: it is computed from the parameter's position and the number of the refresh, so the state of a
    matrix is M, V and a few scalars.

    Args:
        params: as for :class:`GaLoreAdamW`; the published groups carry
            ``rank, update_proj_gap, scale, proj_type, proj, scale_type``.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two sketches, >= 1.
        scale: its square root multiplies the update, >= 0; the authors advise n / rank.
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns.
        proj: "random", or "svd" for GaLore's basis, which is stored.
        scale_type: "channel", one factor a row of R, or "tensor", one for the matrix.
        scale_front: whether the limiter sees the update after the factor sqrt(scale).
        limiter_gamma: how much ||S|| may grow in a step, >= 1; None is no limit.
        refresh: with ``proj="svd"``: "power", "randomized" or "svd", as for :class:`GaLoreAdamW`.
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

    Source: Zhu et al. 2024 (arXiv 2412.05270), algorithm 1. Written from the paper's formulas; the authors' code is
    not free for commercial use and none of it is here.

    Deviations: seeds come from the parameter's position in the groups and the count of refreshes, not from a
    generator that later draws advance; P is never stored. Every ``proj_type`` has its channels on the side that is
    not compressed, where the published code is right for "std" only. The limiter passes an update whose predecessor
    was nearly nothing; see :class:`FiraAdamW`. Only matrices are compressed.
    ``proj="svd", refresh="svd"`` reproduces the published trajectories.
    """

    subspace: Subspace = Gaussian()
    rule = Adam()
    lift = Scaling()

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
        scale: float = 1.0,
        proj_type: str = "std",
        proj: str = "random",
        scale_type: str = "channel",
        scale_front: bool = False,
        limiter_gamma: float | None = 1.01,
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
                "scale": scale,
                "proj_type": proj_type,
                "proj": proj,
                "scale_type": scale_type,
                "scale_front": scale_front,
                "limiter_gamma": limiter_gamma,
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

    def subspace_of(self, param: Tensor, group: Group) -> Subspace:
        """GaLore's subspace for ``proj="svd"``."""
        found = super().subspace_of(param, group)
        return TOP if found is self.subspace and group["proj"] == "svd" else found


class APOLLOMini(APOLLOAdamW):
    """APOLLO with a sketch of rank 1 and one step size a matrix: the optimizer state of plain SGD, almost.

    ``APOLLOAdamW(rank=1, scale_type="tensor", scale=128)``; its formulas, arguments, errors and deviations apply.

    Source: Zhu et al. 2024 (arXiv 2412.05270), section 4.2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        proj_type: str = "std",
        proj: str = "random",
        scale_front: bool = False,
        limiter_gamma: float | None = 1.01,
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
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            proj=proj,
            scale_type="tensor",
            scale_front=scale_front,
            limiter_gamma=limiter_gamma,
            refresh=refresh,
            moments=moments,
            stagger=stagger,
            state_dtype=state_dtype,
            weight_rounding=weight_rounding,
            maximize=maximize,
            capturable=capturable,
            backend=backend,
        )
