"""FRUGAL: Adam in a subspace that keeps state, signSGD in the rest, which needs none."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.sign import SignOutside
from lowrank_optim.optim.options import Common, arguments, flag, number, one_of, optional
from lowrank_optim.optim.parts import (
    Accumulation,
    Group,
    Number,
    Option,
    Parts,
    Refresh,
    Scalar,
    Slot,
    Slots,
    State,
    View,
    Which,
)
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.subspaces.fixed_basis import Columns, Settings
from lowrank_optim.optim.subspaces.oriented import Oriented, on_left
from lowrank_optim.optim.subspaces.random import RandomColumns, RandomOrthonormal
from lowrank_optim.optim.subspaces.singular import TopSingular


class Restarting(Oriented):
    """A subspace of the rank that ``density`` gives, in which moments begin anew at every refresh."""

    accumulation: ClassVar[Accumulation | None] = None
    options = {
        "density": Option(optional(number(0.0, 1.0)), None),
        "reset_moments": Option(flag, True),
        "proj_type": RandomColumns.options["proj_type"],
        "moments": RandomColumns.options["moments"],
    }

    def rank(self, shape: tuple[int, ...], group: Group) -> int:
        """``rank``, or the share ``density`` of the compressed side, at least 1."""
        if group["density"] is None:
            return super().rank(shape, group)
        rows, columns = shape[-2:]
        return max(1, round(group["density"] * (rows if on_left(shape, group["proj_type"]) else columns)))

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Renew the projection; with ``reset_moments`` no coordinate of it had a predecessor.

        A stack begins anew as a whole, and not when only some of its matrices see their first gradient.
        """
        result = super().refresh(grad, state, group, which)
        if result.renewed is False or not group["reset_moments"]:
            return result
        if isinstance(which.warm, Tensor) and which.usable is not None and not bool((which.usable & which.warm).any()):
            return result._replace(overlap=None)
        shape = (*grad.shape[:-2], state["rank"])
        return result._replace(overlap=torch.full(shape, -1, dtype=torch.int64, device=grad.device))


class CosineColumns(Columns):
    """The columns of the orthonormal DCT-II in which the gradient is largest, on any side."""

    options = {}

    def check(self, group: Group) -> None:
        """Nothing: the basis is this one."""

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        return on_left(shape, group["proj_type"])

    def settings(self, group: Group) -> Settings:
        return Settings("dct2", 2, "auto", rotate=group["moments"] != "keep")


class RestartingColumns(Restarting, RandomColumns):
    """Random columns of the weight."""

    options = {**RandomColumns.options, **Restarting.options}


class RestartingSingular(Restarting, TopSingular):
    """GaLore's basis."""

    options = {**TopSingular.options, **Restarting.options}


class RestartingCosines(Restarting, CosineColumns):
    """Columns of the DCT-II."""


class RestartingOrthonormal(Restarting, RandomOrthonormal):
    """A random orthonormal basis."""

    options = {**RandomOrthonormal.options, **Restarting.options}


PROJECTIONS: dict[str, Restarting] = {
    "columns": RestartingColumns(),
    "svd": RestartingSingular(),
    "dct": RestartingCosines(),
    "random": RestartingOrthonormal(),
}


class RestartedAdam(CorrectedAdam):
    """Adam whose bias correction counts from the last reset of the moments and is part of the direction."""

    def slots(self, shape: tuple[int, ...], view: View, group: Group, along: str | None) -> Slots:
        """Moments, and ``reset_step``, the number of the update after which they last were zero."""
        reset = Slot((), torch.float32) if group["capturable"] else Number(0)
        return {**super().slots(shape, view, group, along), "reset_step": reset}

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None, **told: Any) -> Tensor:
        """(M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps) with t = step - reset_step."""
        corrected = super().correction(state["step"] - state["reset_step"], group)
        return super().direction(low, state, group, norms, **told).mul_(corrected)

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        """1: the direction is corrected already."""
        return 1.0

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """Move the moments, or with ``reset_moments`` start again."""
        super().transport(state, overlap, group)
        if not group["reset_moments"]:
            return
        if isinstance(state["step"], Tensor):
            # In place: a CUDA graph reads this very tensor.
            state["reset_step"].copy_(state["step"])
        else:
            state["reset_step"] = state["step"]

    def _eps(self, state: State, group: Group) -> Scalar:
        return super()._eps({"step": state["step"] - state["reset_step"]}, group)


class FRUGALAdamW(LowRankOptimizer):
    """AdamW on a changing part of every matrix, and signSGD, which keeps no state, on the rest.

    For a weight W (m, n) with gradient G, at updates 1, 1 + gap, 1 + 2 gap, ... P becomes a new orthonormal (n, rank)
    matrix (of the smaller side; m < n: on the transpose), M = V = 0, t = 0. Then::

        t = t + 1;  R = G P                            # (m, rank)
        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) R²
        N = M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)
        W = (1 - lr weight_decay) W
        W = W - lr (N Pᵀ + inactive_lr_scale sign(G - R Pᵀ))

    With ``projection="columns"`` P selects rank columns of W, and the others are those that take signs.

    Args:
        params: as for :class:`GaLoreAdamW`.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the corrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is AdamW for every parameter.
        density: instead of the rank, its share of the compressed side, in [0, 1]; the rank is at least 1.
        update_proj_gap: updates between two changes of P, >= 1.
        inactive_lr_scale: factor of the signs, >= 0; the authors take 1 for pretraining and 0.1 for fine-tuning.
        projection: "columns" (random ones), "svd" (GaLore's basis), "dct" (the columns of the DCT-II in which the
            gradient is largest) or "random" (a random orthonormal basis).
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns.
        reset_moments: whether a new P begins with new moments, as published; else ``moments`` says what they become.
        refresh: with ``projection="svd"``: "power", "randomized" or "svd", as for :class:`GaLoreAdamW`.
        moments: without ``reset_moments``: "keep", "align" or "rotate", as for :class:`GaLoreAdamW`; columns follow
            their moments in both of the latter, newly drawn ones begin with zero.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zmushko et al. 2024 (arXiv 2411.07837), algorithm 1.

    Deviations: draws come from the parameter's position and the count of changes, not from a global generator.
    The columns are those of the smaller side; the published code always takes columns (``proj_type="right"``), and a
    share of them, rounded down (``density``). The paper's variant that switches whole layers on and off is missing.
    Convolutions are matrices (out, in * kernel).
    """

    triple = Parts(PROJECTIONS["columns"], RestartedAdam(), SignOutside())
    others = tuple(PROJECTIONS.values())
    full_rank = CorrectedAdam()
    options = {"projection": Option(one_of(*PROJECTIONS), "columns")}
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        density: float | None = None,
        update_proj_gap: int = 200,
        inactive_lr_scale: float = 1.0,
        projection: str = "columns",
        proj_type: str = "std",
        reset_moments: bool = True,
        refresh: str = "power",
        moments: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))

    def parts(self, view: View, group: Group) -> Parts:
        """The subspace that ``projection`` names."""
        return self.triple._replace(subspace=PROJECTIONS[group["projection"]])

    def _explain(self, param: Tensor, group: Group) -> tuple[str, str]:
        method, reason = super()._explain(param, group)
        density = group["density"]
        if group["rank"] is None or density is None or param.ndim < 2:
            return method, reason
        return method, f"density {density:g}" + (" leaves nothing out" if method == "full-rank" else "")
