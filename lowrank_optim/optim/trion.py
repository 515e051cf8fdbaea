"""Trion: orthogonalised momentum on the columns of a fixed basis in which it is largest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.newton_schulz import newton_schulz
from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice, check_positive_int, check_range
from lowrank_optim.optim.columns import Coefficients, add_coefficients_
from lowrank_optim.optim.moments import init_moment, load_moment, replace_moment_, unseen_finite
from lowrank_optim.optim.protocols import IDENTITY, Group, Rule, State, Subspace
from lowrank_optim.optim.rules import CorrectedAdam

SCALINGS = ("kj", "dion", "kimi", "none")
FULL_RANK = CorrectedAdam()


def update_scale(rows: int, columns: int, scaling: str) -> float:
    """The factor of an update whose singular values are about 1, from the weight's shape (out, in)."""
    return {
        "kj": math.sqrt(max(1, rows / columns)),
        "dion": math.sqrt(rows / columns),
        "kimi": 0.2 * math.sqrt(max(rows, columns)),
        "none": 1.0,
    }[scaling]


class NewtonSchulz:
    """The low-rank momentum with its singular values set to about 1. Without state or bias correction."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on ns_steps below 1, or on what the full-rank rule refuses."""
        check_positive_int("ns_steps", group["ns_steps"])
        check_range("adamw_lr", group["adamw_lr"], low=0.0)
        FULL_RANK.validate(group)

    def init(self, like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
        """Nothing: the momentum is the lift's."""

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """Orthogonal to within the iteration's accuracy."""
        return newton_schulz(low, steps=group["ns_steps"], backend=group["backend"])

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
        """1."""
        return 1.0

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """Nothing to move: the momentum is kept in all coordinates."""


class Momentum:
    """A momentum of the whole matrix, of which only the part that is used decays.

    In coefficients, S = B + G D, of which the step takes the selected columns; then B is S with these scaled down.
    The state ``momentum`` is B. S is the only full-size temporary.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on a momentum outside [0, 1) or an unknown scaling."""
        check_range("momentum", group["momentum"], low=0.0, high=1.0, high_open=True)
        check_choice("scaling", group["scaling"], SCALINGS)

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """A zero momentum, (rows, d)."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        shape = subspace.orient(param, state).shape
        init_moment(state, "momentum", shape, dtype, param.device, group["state_dtype"])

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The coefficients of momentum and gradient."""
        total = load_moment(state, "momentum", grad.dtype).clone()
        add_coefficients_(total, grad, group)
        return total

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """target += alpha * scale * up(direction); the selected part of the momentum decays. ``grad`` is used up."""
        rows, columns = reversed(target.shape) if state["left"] else target.shape
        alpha = alpha * update_scale(rows, columns, group["scaling"])
        subspace.add_up_(target, direction, state, group, alpha=alpha)
        finite = unseen_finite(grad)
        grad.index_copy_(-1, state["indices"], low * group["momentum"])
        replace_moment_(state, "momentum", grad, where=finite)


class Trion(LowRankOptimizer):
    """Orthogonalised low-rank momentum for matrices, AdamW for everything else.

    For a weight W (m, n) with n <= m (else all of it transposed), gradient G and an orthogonal basis D (n, n),
    at updates 1, 1 + gap, ... I becomes the ``rank`` columns of S of greatest norm. Then::

        S = (B + G) D                                  # B: momentum
        R = S_I
        B = B + G - (1 - momentum) R D_Iᵀ              # what is not used does not decay
        N = NewtonSchulz(R)                            # (m, rank)
        W = (1 - lr weight_decay) W
        W = W - lr scale N D_Iᵀ

    Embeddings, heads, vectors, tensors of more than two dimensions, matrices whose smaller side does not exceed the
    rank and groups with ``rank=None`` get AdamW, with a learning rate of its own: a group that names no ``lr`` and
    holds both kinds becomes two groups, of which the second has ``lr=adamw_lr``, so that schedulers drive both. A group
    that names its ``lr`` keeps it for all of its parameters.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()`` (embeddings, head, norms and
            biases get AdamW), :func:`low_rank_groups`, or groups.
        lr: learning rate of the matrices, a number >= 0 or a one-element tensor.
        betas: decay of AdamW's two moments, each in [0, 1).
        eps: AdamW's, >= 0.
        weight_decay: decoupled, >= 0, of both kinds.
        rank: selected columns, >= 1.
        momentum: what stays of the part that was used, in [0, 1).
        ns_steps: Newton-Schulz iterations, >= 1.
        scaling: the factor for a weight (m, n): "kj" sqrt(max(1, m/n)), "dion" sqrt(m/n), "kimi" 0.2 sqrt(max(m, n)),
            "none" 1.
        basis, ell_norm, similarity: as in :class:`DCTAdamW`.
        update_proj_gap: updates between two selections, >= 1.
        adamw_lr: learning rate of AdamW, as ``lr``.
        state_dtype: storage of momentum and of AdamW's moments: "float32", "bfloat16" (stochastically rounded) or
            "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        stagger: spread the selections of the parameters over the gap instead of one step for all.
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Modoranu et al. 2025 (arXiv 2505.17967); Newton-Schulz: Jordan et al. 2024.

    Deviations: the published code scores by the 1-norm (``ell_norm=1``) and has the basis "dct3" where n <= m and
    "dct2" where not; here the basis does not depend on the side and is exact. B is kept as B D. Selections come at
    1 + k gap; published is a gap of 1.
    """

    subspace = Coefficients()
    rule = NewtonSchulz()
    lift = Momentum()
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        momentum: float = 0.95,
        ns_steps: int = 5,
        scaling: str = "kj",
        basis: str = "dct2",
        ell_norm: int = 2,
        similarity: str = "auto",
        update_proj_gap: int = 1,
        adamw_lr: float | Tensor = 3e-4,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        stagger: bool = False,
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
                "momentum": momentum,
                "ns_steps": ns_steps,
                "scaling": scaling,
                "basis": basis,
                "ell_norm": ell_norm,
                "similarity": similarity,
                "update_proj_gap": update_proj_gap,
                "adamw_lr": adamw_lr,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "stagger": stagger,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )

    def rule_of(self, subspace: Subspace) -> Rule:
        """AdamW for what is not compressed."""
        return FULL_RANK if subspace is IDENTITY else self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without an ``lr`` of its own, what gets AdamW is split off with ``lr=adamw_lr``."""
        keeps_lr = "lr" in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        full_rank = [self.subspace_of(p, group) is IDENTITY for p in group["params"]]
        if keeps_lr or not any(full_rank):
            return
        rest = {**group, "lr": group["adamw_lr"]}
        for key in ("params", "param_names"):
            if key in group:
                rest[key] = [value for value, full in zip(group[key], full_rank) if full]
                group[key] = [value for value, full in zip(group[key], full_rank) if not full]
        if group["params"]:
            self.param_groups.append(rest)
        else:
            self.param_groups[-1] = rest
