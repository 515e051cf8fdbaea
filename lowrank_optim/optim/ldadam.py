"""LDAdam: Adam in a subspace that turns a little in every step, with moments and error that turn along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.options import Common, arguments, flag
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, Scalar, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import MOMENT_KEYS, CorrectedAdam
from lowrank_optim.optim.state_storage import load_moment, moment_slots, replace_moment_, store_moment_
from lowrank_optim.optim.subspaces.tracking import Tracking, carried_momentum


class ProjectionAwareAdam(CorrectedAdam):
    """Adam whose second moment is moved as that of a random gradient with the mean and variance seen so far."""

    # What is missing is not zero.
    masks = False

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None, **told: Any) -> Tensor:
        """Adam's, on what of ``low`` is not carried momentum."""
        carried = carried_momentum(group)
        if carried:
            low = low - carried * load_moment(state, "exp_avg", low.dtype)
        return super().direction(low, state, group, norms, **told)

    def missing(self, low: Tensor, state: State, group: Group) -> Scalar:
        """The carried momentum alone, of which the direction is that of a gradient of zeros."""
        carried = carried_momentum(group)
        return carried * load_moment(state, "exp_avg", low.dtype) if carried else 0.0

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """M <- M O ; V <- c |(V̂ - M̂²) O² + (M̂ O)²|, with c = 1 - beta2^t and moments corrected at step t."""
        beta1, beta2 = group["betas"]
        step = state["step"]
        unbias = 1 - beta2**step
        first, second = (load_moment(state, key, torch.float32) for key in MOMENT_KEYS)
        overlap = overlap.to(first.dtype)
        turned, unbias_first = first @ overlap, 1 - beta1**step
        variance = second / unbias - (first / unbias_first).abs().square()
        moved = variance @ overlap.abs().square() + (turned / unbias_first).abs().square()
        store_moment_(state, "exp_avg", turned)
        store_moment_(state, "exp_avg_sq", moved.abs() * unbias)


class GeneralizedErrorFeedback(Lift):
    """What the new subspace misses of gradient and momentum is added to the next gradient.

    A = G + E and the old momentum go into one matrix, A + beta1 / (1 - beta1) M Pᵀ, the only full-size temporary;
    the error, in ``error``, is what the new subspace leaves of it.
    """

    changes_gradient = True
    splits = frozenset({"rows"})
    options = {"error_feedback": Option(flag, True)}

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        if not group["error_feedback"]:
            return {}
        return moment_slots("error", shape, view.wide, group["state_dtype"], "elements")

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """A and the old momentum; the gradient itself without error feedback."""
        if not group["error_feedback"]:
            return grad
        total = load_moment(state, "error", grad.dtype) + grad
        basis, momentum = state["basis"].to(total.dtype), load_moment(state, "exp_avg", grad.dtype)
        product_ = torch.Tensor.addmm_ if total.ndim == 2 else torch.Tensor.baddbmm_
        return product_(total, momentum, basis.mH, alpha=carried_momentum(group))

    def update(self, step: Step, state: State, group: Group) -> Update:
        return Update(step.direction)

    def after(self, step: Step, state: State, group: Group) -> None:
        """The error becomes grad - project_back(low)."""
        if group["error_feedback"]:
            step.subspace.project_back_(step.grad, step.low, state, group, alpha=-1.0)
            replace_moment_(state, "error", step.grad, step.ok)


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
    that are not compressed (vectors, sides not exceeding the rank, groups with
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
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Robert et al. 2024 (arXiv 2410.16103).

    Deviations: the error is a state of its own where the published code keeps it in ``p.grad``, so that gradients
    can be freed, clipped and unscaled. Moments and error are fp32 by default where the published ones have the
    gradient's dtype; each group's betas count. A rank of at least the smaller side is the full-rank rule.
    """

    triple = Parts(Tracking(), ProjectionAwareAdam(), GeneralizedErrorFeedback())
    full_rank = CorrectedAdam()
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
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
