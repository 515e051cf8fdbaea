"""RACS: rows and columns of the gradient scaled by the best rank-one fit to its squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.two_sided import LARGEST, rank_one_fit, scaled_norm
from lowrank_optim.optim.finite import is_finite
from lowrank_optim.optim.lifts.norm_scaling import GrowthLimiter
from lowrank_optim.optim.options import Common, arguments, number, positive_int
from lowrank_optim.optim.parts import Group, Option, Parts, Slot, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.subspaces.whole import Unchanged, Whole
from lowrank_optim.optim.two_rates import TwoRates


class RankOneScaling(GrowthLimiter):
    """The gradient over the root of a mean rank-one fit; ``row_scale`` and ``column_scale`` are the means q and s.

    A matrix without a gradient has no fit, and keeps its means.
    """

    needs_norms = False
    options = {
        **GrowthLimiter.options,
        "beta": Option(number(0.0, 1.0, high_open=True), 0.9),
        "iterations": Option(positive_int, 5),
        "scale": Option(number(), 0.05),
    }

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        dtype = view.wide.to_real()
        return {
            **super().slots(view, shape, group),
            "row_scale": Slot((*shape[:-1], 1), dtype, "rows"),
            "column_scale": Slot((*shape[:-2], shape[-1], 1), dtype, "columns"),
        }

    def update(self, step: Step, state: State, group: Group) -> Update:
        rows, columns = rank_one_fit(step.grad, group["iterations"])
        ok = is_finite(step.ok) if isinstance(step.ok, Tensor) else step.ok
        exists = (rows.sum((-2, -1), keepdim=True) > 0) & ok
        scales = []
        for key, new in (("row_scale", rows), ("column_scale", columns.mT)):
            mean: Tensor = state[key]
            mean.copy_(torch.where(exists, mean.lerp(new, 1 - group["beta"]), mean))
            scales.append(torch.where(mean > 0, mean.rsqrt().clamp_max(LARGEST), 0))
        below, beside = scales[0], scales[1].mT
        norm = scaled_norm(step.grad, below, beside)
        if isinstance(ok, Tensor):
            # In a stack the other matrices must not move either.
            norm = torch.where(ok, norm, torch.inf)
        limit = self.limit(norm, (below.shape[-2] * beside.shape[-1]) ** 0.5, state, group)
        return Update(row_scale=below * (limit * group["scale"]), column_scale=beside)


class RACS(TwoRates):
    """Gradients scaled by row and by column for matrices, with a state of m + n + 1 numbers; AdamW for the rest.

    For a weight W (m, n) with gradient G and P = |G|² by element::

        q = 1;  iterations times:  s = Pᵀ q / ||q||²;  q = P s / ||s||²
        S = beta S + (1 - beta) s;  Q = beta Q + (1 - beta) q      # from zero, without bias correction
        X = G / sqrt(Q Sᵀ)
        X = X / (max(||X|| / (x + 1e-8), gamma) / gamma);  x = ||X||
        W = (1 - lr weight_decay) W
        W = W - lr scale X

    X is never formed. At the first step it is 1 / (1 - beta) times what it comes to later, which a warm-up hides.
    Embeddings, heads, vectors and groups with ``rank=None`` get AdamW with a learning rate of its own, which stays at
    the ratio adamw_lr / lr of the group's ``lr``.

    Args:
        params: tensors (every matrix counts), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate of matrices, a number >= 0 or a one-element tensor.
        betas: decay of AdamW's two moments, each in [0, 1).
        eps: AdamW's, >= 0.
        weight_decay: decoupled, >= 0; of matrices too, where the paper has none.
        beta: decay of Q and S, in [0, 1).
        iterations: of the fit, >= 1.
        scale: factor of the step on matrices, >= 0.
        limiter_gamma: how much ||X|| may grow in a step, >= 1; None is no limit.
        adamw_lr: learning rate of AdamW while ``lr`` has its initial value; None is ``lr``.
        common: stagger (without effect), state_dtype (of AdamW), weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Gong et al. 2025 (arXiv 2502.07752), RACS.

    Deviations: a matrix of zeros keeps Q and S, since its fit is 0/0; where Q or S is zero nothing moves. The limiter
    is that of :class:`FiraAdamW`: an update whose predecessor was nearly nothing passes.
    """

    triple = Parts(Whole(), Unchanged(), RankOneScaling())
    full_rank = CorrectedAdam()
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta: float = 0.9,
        iterations: int = 5,
        scale: float = 0.05,
        limiter_gamma: float | None = 1.01,
        adamw_lr: float | Tensor | None = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"rank": 1, **arguments(locals())})
