"""LDAdam: Adam in a subspace that turns a little in every step, with moments and error that turn along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import orthonormalize
from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.galore import TopSingular, top_basis
from lowrank_optim.optim.moments import init_moment, load_moment, replace_moment_, store_moment_, unseen_finite
from lowrank_optim.optim.protocols import IDENTITY, Group, Refresh, Rule, State, Subspace
from lowrank_optim.optim.rules import MOMENT_KEYS, CorrectedAdam

PROJ_TYPES = ("std", "reverse_std", "left", "right")
PROJ_METHODS = ("power_iteration", "svd")
FULL_RANK = CorrectedAdam()


def carried_momentum(group: Group) -> float:
    """How many times the momentum is in what :class:`GeneralizedErrorFeedback` hands on: beta1 / (1 - beta1) or 0.

    (1 - beta1) A + beta1 M Pᵀ is the momentum of the whole matrix; its share outside of the new subspace, over
    1 - beta1, is the published generalized error A - P ĝ + beta1 / (1 - beta1) (P' M' - P M).
    """
    beta1: float = group["betas"][0]
    return beta1 / (1 - beta1) if group["error_feedback"] else 0.0


class Tracking(TopSingular):
    """The dominant subspace of a mean of momentum and gradient, one block power iteration a step."""

    def validate(self, group: Group) -> None:
        """Raise ValueError on an unknown proj_type or proj_method, or a rho outside [0, 1]."""
        check_choice("proj_type", group["proj_type"], PROJ_TYPES)
        check_choice("proj_method", group["proj_method"], PROJ_METHODS)
        check_range("rho", group["rho"], low=0.0, high=1.0)

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """As in GaLore, but "std" compresses the rows of a square matrix."""
        square = param.shape[0] == param.shape[1] and group["proj_type"] == "std"
        return super().init(param, state, {**group, "proj_type": "left"} if square else group)

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Turn the basis towards rho P M̂ᵀ + (1 - rho) A; the first is taken from A alone by an SVD."""
        rank, started = group["rank"], int(state["step"]) > 0
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        basis: Tensor | None = None
        if started:
            # grad is A + carried M Pᴴ; in terms of it, the mean has this much of M Pᴴ.
            beta1 = group["betas"][0]
            share = group["rho"] / (1 - beta1 ** int(state["step"])) - (1 - group["rho"]) * carried_momentum(group)
            old, momentum = state["basis"].to(grad.dtype), load_moment(state, "exp_avg", grad.dtype)
            if group["proj_method"] == "svd":
                grad = torch.addmm(grad, momentum, old.mH, alpha=share, beta=1 - group["rho"])
            else:
                # B = share M Pᴴ + (1 - rho) A is never formed: B P and Bᴴ (B P) by their terms.
                image = share * momentum + (1 - group["rho"]) * (grad @ old)
                image = image / image.abs().amax().clamp_min(torch.finfo(image.dtype).tiny)
                turned = torch.addmm(old @ (momentum.mH @ image), grad.mH, image, alpha=1 - group["rho"], beta=share)
                basis = orthonormalize(turned)
        if basis is None:
            basis = top_basis(grad, rank, {"refresh": "svd"}, state, left=state["left"], key="basis")
        if basis is None or not bool(basis.sum().isfinite()):
            return Refresh(renewed=False)
        overlap = state["basis"].to(basis.dtype).mH @ basis if started else None
        state["basis"].copy_(basis)
        return Refresh(renewed=True, overlap=overlap)

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        return grad @ state["basis"].to(grad.dtype)


class ProjectionAwareAdam(CorrectedAdam):
    """Adam whose second moment is moved as that of a random gradient with the mean and variance seen so far."""

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """Adam's, on what of ``low`` is not carried momentum."""
        carried = carried_momentum(group)
        if carried:
            low = low - carried * load_moment(state, "exp_avg", low.dtype)
        return super().direction(low, state, group)

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """M <- M O ; V <- c |(V̂ - M̂²) O² + (M̂ O)²|, with c = 1 - beta2^t and moments corrected at step t."""
        beta1, beta2 = group["betas"]
        step = state["step"]
        unbias = 1 - beta2**step
        first, second = (load_moment(state, key, torch.float32) for key in MOMENT_KEYS)
        overlap = overlap.to(first.dtype)
        mean = first / (1 - beta1**step)
        variance = second / unbias - mean.abs().square()
        moved = variance @ overlap.abs().square() + (mean @ overlap).abs().square()
        store_moment_(state, "exp_avg", first @ overlap)
        store_moment_(state, "exp_avg_sq", moved.abs() * unbias)


class GeneralizedErrorFeedback:
    """What the new subspace misses of gradient and momentum is added to the next gradient.

    A = G + E and the old momentum go into one matrix, A + beta1 / (1 - beta1) M Pᵀ, the only full-size temporary;
    the error, in ``error``, is what the new subspace leaves of it.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError unless error_feedback is a bool."""
        check_choice("error_feedback", group["error_feedback"], (True, False))

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """A zero error, oriented."""
        if group["error_feedback"]:
            shape, dtype = subspace.orient(param, state).shape, torch.promote_types(param.dtype, torch.float32)
            init_moment(state, "error", shape, dtype, param.device, group["state_dtype"])

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """A and the old momentum; the gradient itself without error feedback."""
        if not group["error_feedback"]:
            return grad
        total = load_moment(state, "error", grad.dtype) + grad
        basis, momentum = state["basis"].to(total.dtype), load_moment(state, "exp_avg", grad.dtype)
        return total.addmm_(momentum, basis.mH, alpha=carried_momentum(group))

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """target += alpha * up(direction); the error becomes grad - up(low). ``grad`` is used up."""
        subspace.add_up_(target, direction, state, group, alpha=alpha)
        if not group["error_feedback"]:
            return
        finite = unseen_finite(grad)
        subspace.add_up_(grad, low, state, group, alpha=-1.0)
        replace_moment_(state, "error", grad, where=finite)


class LDAdamW(LowRankOptimizer):
    """AdamW in a subspace that follows gradient and momentum in every step, losing nothing of either.

    For a weight W (m, n) with n < m (else all of it transposed), gradient G, error E, basis P (n, rank) and its
    predecessor P'::

        A = G + E
        B = rho M̂ P'ᵀ + (1 - rho) A
        P = qr(Bᵀ (B P'))                              # the first: the dominant singular vectors of A
        Q = P'ᵀ P ;  M' = M ;  M = M' Q ;  V = (1 - beta2^(t-1)) |(V̂ - M̂²) Q² + (M̂ Q)²|
        R = A P
        E = A - R Pᵀ + beta1 / (1 - beta1) (M' P'ᵀ - M Pᵀ)
        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) R²
        W = (1 - lr weight_decay) W
        W = W - lr (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps) Pᵀ

    with the squares of matrices taken by element, and M̂, V̂ the moments before the step, bias-corrected. Parameters
    that are not compressed (vectors, tensors of more than two dimensions, sides not exceeding the rank, groups with
    ``rank=None``) follow AdamW.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()`` (embeddings, head, norms and
            biases stay full-rank), :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the bias-corrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        rho: weight of the momentum in B, in [0, 1].
        proj_type: "std" compresses the smaller side (of a square matrix the rows), "reverse_std" the larger, "left" the
            rows, "right" the columns.
        proj_method: "power_iteration" as above, or "svd": P holds the dominant singular vectors of B.
        error_feedback: False drops E, and with it a state as large as the weight, stored as ``state_dtype`` says.
        update_proj_gap: updates from one P to the next, >= 1; published: 1.
        state_dtype: storage of moments and error: "float32", "bfloat16" (stochastically rounded) or
            "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        stagger: spread the refreshes of the parameters over the gap instead of one step for all.
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Robert et al. 2024 (arXiv 2410.16103).

    Deviations: the error is a state of its own where the published code keeps it in ``p.grad``, so that gradients
    can be freed, clipped and unscaled. Moments and error are fp32 by default where the published ones have the
    gradient's dtype; each group's betas count. A rank of at least the smaller side is the full-rank rule.
    """

    subspace = Tracking()
    rule = ProjectionAwareAdam()
    lift = GeneralizedErrorFeedback()
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        rho: float = 0.908,
        proj_type: str = "std",
        proj_method: str = "power_iteration",
        error_feedback: bool = True,
        update_proj_gap: int = 1,
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
                "rho": rho,
                "proj_type": proj_type,
                "proj_method": proj_method,
                "error_feedback": error_feedback,
                "update_proj_gap": update_proj_gap,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "stagger": stagger,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )

    def rule_of(self, subspace: Subspace) -> Rule:
        """Plain AdamW for what is not compressed: there is no basis to follow."""
        return FULL_RANK if subspace is IDENTITY else self.rule
