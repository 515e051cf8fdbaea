"""FRUGAL: Adam in a subspace that keeps state, signSGD in the rest, which needs none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optim.base import Explanation, LowRankOptimizer
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.columns import Columns
from lowrank_optim.optim.galore import TopSingular
from lowrank_optim.optim.protocols import IDENTITY, Group, Refresh, Rule, State, Subspace
from lowrank_optim.optim.random_bases import RandomColumns, RandomOrthonormal
from lowrank_optim.optim.rules import CorrectedAdam
from lowrank_optim.optim.scaling import SIDES, on_host

COSINES: Group = {"basis": "dct2", "ell_norm": 2, "similarity": "auto"}
TOP = TopSingular()
ADAMW = CorrectedAdam()


def rank_of(shape: torch.Size, group: Group) -> int:
    """``rank``, or the share ``density`` of the compressed side, at least 1."""
    if group["density"] is None:
        return int(group["rank"])
    rows, columns = shape
    side = {"std": min(shape), "reverse_std": max(shape), "left": rows, "right": columns}[group["proj_type"]]
    return max(1, round(group["density"] * side))


class CosineColumns(Columns):
    """The columns of the orthonormal DCT-II in which the gradient is largest, on any side."""

    def validate(self, group: Group) -> None:
        """Nothing: the basis is this one, and any side will do."""

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left`` and ``indices`` (rank,)."""
        shape = TOP.init(param, state, group)
        del state["basis"]
        state["indices"] = torch.zeros(group["rank"], dtype=torch.int64, device=param.device)
        return shape

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Select the columns; moments other than "keep" follow those that stay."""
        return super().refresh(grad, state, {**group, **COSINES, "rotate": group["moments"] != "keep"})

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        return super().down(grad, state, COSINES)

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha * up(low)."""
        super().add_up_(target, low, state, COSINES, alpha=alpha)


PROJECTIONS: dict[str, Subspace] = {
    "columns": RandomColumns(),
    "svd": TOP,
    "dct": CosineColumns(),
    "random": RandomOrthonormal(),
}


class Projection:
    """The subspace that ``projection`` names, of the rank that ``density`` gives, without memory of the one before."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on an unknown projection or proj_type or a density out of (0, 1]."""
        check_choice("projection", group["projection"], PROJECTIONS)
        check_choice("proj_type", group["proj_type"], SIDES)
        if group["density"] is not None:
            check_range("density", group["density"], low=0.0, high=1.0)
        PROJECTIONS[group["projection"]].validate(group)

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        """Matrices whose smaller side exceeds the rank."""
        return len(shape) == 2 and min(shape) > rank_of(shape, group)

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """The state of the projection."""
        sized = {**group, "rank": rank_of(param.shape, group)}
        return PROJECTIONS[group["projection"]].init(param, state, sized)

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The view whose last axis is the compressed one."""
        return tensor.mT if state["left"] else tensor

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Renew the projection; with ``reset_moments`` no coordinate of it had a predecessor."""
        shape = grad.mT.shape if state["left"] else grad.shape
        sized = {**group, "rank": rank_of(shape, group)}
        if group["reset_moments"]:
            sized["moments"] = "keep"
        refreshed = PROJECTIONS[group["projection"]].refresh(grad, state, sized)
        if not (refreshed.renewed and group["reset_moments"]):
            return refreshed
        return Refresh(renewed=True, overlap=torch.full((sized["rank"],), -1, device=grad.device))

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        return PROJECTIONS[group["projection"]].down(grad, state, group)

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha * up(low)."""
        PROJECTIONS[group["projection"]].add_up_(target, low, state, group, alpha=alpha)


class RestartedAdam(CorrectedAdam):
    """Adam whose bias correction counts from the last reset of the moments and is part of the direction."""

    def init(self, like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
        """Zero moments, and ``reset_step``, the number of the update after which they last were zero."""
        super().init(like, shape, state, group)
        state["reset_step"] = torch.zeros_like(state["step"]) if group["capturable"] else 0

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """(M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps) with t = step - reset_step."""
        corrected = super().correction(state["step"] - state["reset_step"], group)
        return super().direction(low, state, group).mul_(corrected)

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
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

    def _eps(self, state: State, group: Group) -> float | Tensor:
        return super()._eps({"step": state["step"] - state["reset_step"]}, group)


class SignResidual:
    """W += alpha (up(N) + inactive_lr_scale sgn(G - up(R)))."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on a negative inactive_lr_scale."""
        check_range("inactive_lr_scale", group["inactive_lr_scale"], low=0.0)

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """Nothing."""

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The gradient itself."""
        return grad

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """A sign has no factored form, so here the residual is a matrix; the whole update is collected in it."""
        if on_host(grad):
            update = grad.clone()
        else:
            # The base made the low-rank gradient zero where this one is not finite; its signs must follow.
            finite = grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).isfinite()
            update = torch.where(finite, grad, 0)
        subspace.add_up_(update, low, state, group, alpha=-1.0)
        update.sgn_().mul_(group["inactive_lr_scale"])
        subspace.add_up_(update, direction, state, group, alpha=1.0)
        if isinstance(alpha, Tensor):
            target.add_(update.mul_(alpha))
        else:
            target.add_(update, alpha=alpha)


class FRUGALAdamW(LowRankOptimizer):
    """AdamW on a changing part of every matrix and signSGD, which keeps no state, on the rest of it.

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
        stagger: spread the changes of the parameters over the gap instead of one step for all.
        state_dtype: storage of the moments: "float32", "bfloat16" (stochastically rounded) or "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zmushko et al. 2024 (arXiv 2411.07837), algorithm 1.

    Deviations: draws come from the parameter's position and the count of changes, not from a global generator.
    The columns are those of the smaller side; the published code always takes columns (``proj_type="right"``), and a
    share of them, rounded down (``density``). The paper's variant that switches whole layers on and off is missing.
    Only matrices are compressed.
    """

    subspace = Projection()
    rule = RestartedAdam()
    lift = SignResidual()
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
                "density": density,
                "update_proj_gap": update_proj_gap,
                "inactive_lr_scale": inactive_lr_scale,
                "projection": projection,
                "proj_type": proj_type,
                "reset_moments": reset_moments,
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

    def rule_of(self, subspace: Subspace) -> Rule:
        """AdamW, with nothing to restart, for what is not compressed."""
        return ADAMW if subspace is IDENTITY else self.rule

    def explain(self) -> list[Explanation]:
        """Which parameter gets which method and why; the rank of each where ``density`` decides it."""
        rows = super().explain()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in enumerate(pairs):
            if group["rank"] is None or group["density"] is None or p.ndim != 2:
                continue
            rank, density = rank_of(p.shape, group), group["density"]
            compressed = self.subspace_of(p, group) is not IDENTITY
            rows[i] = rows[i]._replace(
                method=f"rank {rank}" if compressed else "full-rank",
                reason=f"density {density:g}" if compressed else f"density {density:g} leaves nothing out",
            )
        return rows
