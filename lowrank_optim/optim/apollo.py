"""APOLLO: the raw gradient, rescaled channel by channel as Adam would rescale a random sketch of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.norm_scaling import GrowthLimiter
from lowrank_optim.optim.options import Common, arguments, flag, number, one_of
from lowrank_optim.optim.parts import Group, Option, Parts, State, Step, Update, View
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.subspaces.random import Gaussian
from lowrank_optim.optim.subspaces.singular import TopSingular

TOP = TopSingular()


class ChannelScaling(GrowthLimiter):
    """W += size sqrt(scale) phi G, its growth limited; nothing is projected back."""

    options = {
        **GrowthLimiter.options,
        "scale": Option(number(), 1.0),
        "scale_type": Option(one_of("channel", "tensor"), "channel"),
        "scale_front": Option(flag, False),
    }

    def update(self, step: Step, state: State, group: Group) -> Update:
        """The gradient alone; the norms are all that the low-rank gradient and its direction are for."""
        strength = group["scale"] ** 0.5
        seen = strength if group["scale_front"] else 1.0
        whole = group["scale_type"] == "tensor"
        scale, _ = self.limited(step, state, group, seen=seen, strength=strength, whole=whole)
        return Update(row_scale=scale)


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
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhu et al. 2024 (arXiv 2412.05270), algorithm 1. Written from the paper's formulas; the authors' code is
    not free for commercial use and none of it is here.

    Deviations: seeds come from the parameter's position in the groups and the count of refreshes, not from a
    generator that later draws advance; P is never stored. Every ``proj_type`` has its channels on the side that is
    not compressed, where the published code is right for "std" only. The limiter passes an update whose predecessor
    was nearly nothing; see :class:`FiraAdamW`. Convolutions are matrices
    (out, in * kernel).
    ``proj="svd", refresh="svd"`` reproduces the published trajectories.
    """

    triple = Parts(Gaussian(), Adam(), ChannelScaling())
    others = (TOP,)
    options = {"proj": Option(one_of("random", "svd"), "random")}

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
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))

    def parts(self, view: View, group: Group) -> Parts:
        """GaLore's subspace for ``proj="svd"``."""
        return self.triple._replace(subspace=TOP) if group["proj"] == "svd" else self.triple


class APOLLOMini(APOLLOAdamW):
    """APOLLO with a sketch of rank 1 and one step size per matrix: almost the memory of plain SGD.

    ``APOLLOAdamW(rank=1, scale_type="tensor", scale=128)``; its formulas, errors and deviations apply, and so do its
    arguments params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type, proj, scale_front,
    limiter_gamma, refresh, moments, stagger, state_dtype, weight_rounding, maximize, capturable and backend.

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
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, **{"scale_type": "tensor", **arguments(locals())})
