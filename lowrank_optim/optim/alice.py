"""Alice: Adam in leading and random directions of a tracked covariance, and a compensation of what they leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.limited_scale import norm_of
from lowrank_optim.ops.orthonormal import normalize_, orthonormalize
from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.ops.two_sided import largest_entry
from lowrank_optim.optim.finite import is_finite
from lowrank_optim.optim.lifts.norm_scaling import GrowthLimiter
from lowrank_optim.optim.options import Common, arguments, number, one_of, optional_positive_int
from lowrank_optim.optim.parts import (
    Group,
    Option,
    Parts,
    Refresh,
    Scalar,
    Slot,
    Slots,
    State,
    Step,
    Update,
    View,
    Which,
)
from lowrank_optim.optim.rules.adam import Adam, CorrectedAdam, check_betas
from lowrank_optim.optim.state_storage import SALTS
from lowrank_optim.optim.subspaces.oriented import Stored, keep_where
from lowrank_optim.optim.subspaces.random import noise
from lowrank_optim.optim.subspaces.singular import top_basis, usable
from lowrank_optim.optim.two_rates import TwoRates


class TrackedEigen(Stored):
    """``leading`` eigenvectors of a tracked covariance of the smaller side, and random directions beside them."""

    options = {
        "leading": Option(optional_positive_int, 40),
        "beta3": Option(number(0.0, 1.0, high_open=True), 0.999),
        "start": Option(one_of("randomized", "svd"), "randomized"),
    }

    def slots(self, view: View, group: Group) -> Slots:
        slots, rank = super().slots(view, group), self.rank(view.shape, group)
        # Without a memory the tracked part is zero.
        return {**slots, "covariance": Slot((*view.batch, rank, rank), view.wide)} if group["beta3"] > 0 else slots

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """The next basis; the covariance, of the size of the smaller side, is never formed."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        old = self.basis(grad, state, group)
        start = old
        if which.warm is not True:
            first = top_basis(grad, state["rank"], group["start"], state, left=bool(state["left"]), which=which)
            if first is None:
                return Refresh(renewed=False)
            start = first if which.warm is False else keep_where(which.warm, old, first)
        vectors = self._eigenvectors(grad, start, old, state, group)
        rank = vectors.shape[-1]
        leading = min(group["leading"] or rank, rank)
        basis = self._completed(vectors, leading, state, group) if leading < rank else vectors
        if not usable(basis, which):
            return Refresh(renewed=False)
        state["basis"].copy_(keep_where(which.usable, basis, old))
        return Refresh(renewed=True)

    def _eigenvectors(self, grad: Tensor, start: Tensor, old: Tensor, state: State, group: Group) -> Tensor:
        """One subspace iteration on Q = beta3 U C Uᴴ + (1 - beta3) Gᴴ G, and the eigenvectors of Q in its image."""
        new = 1 - group["beta3"]
        # Squares neither under- nor overflow.
        unit = largest_entry(grad)
        tracked = state["covariance"].to(grad.dtype) / unit / unit * group["beta3"] if new < 1 else None
        image = new * (grad.mH @ (grad @ start / unit)) / unit
        if tracked is not None:
            image += old @ (tracked @ (old.mH @ start))
        normalize_(image)
        basis = orthonormalize(image)
        low = grad @ basis / unit
        inner = new * (low.mH @ low)
        if tracked is not None:
            shift = basis.mH @ old
            inner += shift @ tracked @ shift.mH
        normalize_(inner)
        # Which would not converge, for the whole batch.
        broken = ~inner.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        turn = torch.linalg.eigh(inner.masked_fill(broken, 0)).eigenvectors.flip(-1)
        # The sign is free: the one of the vector that was there before.
        sign = turn.diagonal(dim1=-2, dim2=-1).conj().sgn()
        return basis @ (turn * torch.where(sign == 0, torch.ones_like(sign), sign).unsqueeze(-2))

    def _completed(self, vectors: Tensor, leading: int, state: State, group: Group) -> Tensor:
        """The leading vectors, and directions drawn uniformly from what is orthogonal to all of them."""
        *batch, d, rank = vectors.shape
        key = mix_key(state["seed"], state["step"], SALTS["basis"])
        drawn = noise((*batch, d, rank - leading), vectors, key, group).to(vectors.dtype)
        kept = vectors[..., :leading]
        # Where there are not enough such directions, orthogonal to the leading ones.
        known = vectors if d - rank >= rank - leading else kept
        drawn -= known @ (known.mH @ drawn)
        return orthonormalize(torch.cat((kept, drawn), -1))


class TrackingAdam(Adam):
    """Adam without bias correction, which keeps the mean covariance of the low-rank gradient beside its moments."""

    masks = False
    rowwise = False

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None, **told: Any) -> Tensor:
        if "covariance" in state:
            state["covariance"].lerp_(low.mH @ low, 1 - group["beta3"])
        return super().direction(low, state, group, norms, **told)

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        return 1.0


class OtherAdamW(CorrectedAdam):
    """AdamW with betas of its own."""

    betas = "adamw_betas"
    options = {"eps": Adam.options["eps"], "adamw_betas": Option(check_betas, (0.9, 0.999))}


class Compensation(GrowthLimiter):
    """The direction projected back, and the residual of the gradient over the root of its mean energy, row by row.

    The state ``outside`` is the mean energy that the subspace leaves of every row.
    """

    reads_low = True
    options = {
        **GrowthLimiter.options,
        "scale": Option(number(), 0.3),
        "compensation": Option(number(), 0.4),
    }

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        along = "rows" if shape[-2] == view.shape[-2] else "columns"
        outside = Slot((*shape[:-1], 1), view.wide.to_real(), along)
        return {**super().slots(view, shape, group), "outside": outside}

    def update(self, step: Step, state: State, group: Group) -> Update:
        """One product: up(N - f R) + f G, with a factor f a row; the norm of the residual is known without it."""
        assert step.norms is not None
        of_low, of_direction = step.norms.low.unsqueeze(-1)
        energy = step.norms.grad.square()
        if isinstance(step.ok, Tensor):
            # In a stack the other matrices must not move either.
            energy = torch.where(is_finite(step.ok), energy, torch.inf)
        outside = energy - of_low.square()
        # Less is rounding, of the norms or of a basis in the dtype of the gradient.
        least = max(8 * torch.finfo(energy.dtype).eps, torch.finfo(step.grad.dtype).eps)
        outside = torch.where(outside < least * energy, 0, outside)
        mean: Tensor = state["outside"]
        # Infinite where the gradient is not finite.
        mean.lerp_(torch.where(outside < torch.inf, outside, 0), 1 - group["betas"][0])
        factor = torch.where(outside > 0, ((step.grad.shape[-1] - step.low.shape[-1]) / mean).sqrt(), 0)
        norm = norm_of(factor * outside.sqrt(), step.sums)
        limit = self.limit(norm, norm_of(of_direction, step.sums), state, group)
        factor = torch.where(limit > 0, factor * (limit * group["compensation"]), 0)
        low = step.direction.addcmul_(step.low, factor, value=-1)
        return Update(low, scale=group["scale"], row_scale=factor * group["scale"])


class Alice(TwoRates):
    """Adam in a subspace that follows a mean covariance, and a compensation of the rest; AdamW for everything else.

    For a weight W (m, n) with gradient G, n <= m (else on its transpose), at updates 1, 1 + gap, ...::

        Q = beta3 U C Uᵀ + (1 - beta3) Gᵀ G            # (n, n), never formed
        U = qr(Q U);  U = U E,  E the eigenvectors of Uᵀ Q U, largest first
        U = [the first ``leading`` columns, random ones orthogonal to all of U]

    and at every update::

        R = G U                                        # (m, rank)
        C = beta3 C + (1 - beta3) Rᵀ R
        M = beta1 M + (1 - beta1) R;  V = beta2 V + (1 - beta2) R²
        p_i = beta1 p_i + (1 - beta1) (||G_i||² - ||R_i||²)
        S_i = sqrt(n - rank) (G - R Uᵀ)_i / sqrt(p_i)
        S = S / (max(||S|| / (s + 1e-8), gamma) / gamma);  s = ||S||
        W = (1 - lr weight_decay) W
        W = W - lr scale (M / (sqrt(V) + eps) Uᵀ + compensation S)

    without bias corrections. Moments and C stay as they are when U changes. ``beta3=0`` is the paper's Alice-0, without
    C. Embeddings, heads, vectors, matrices whose smaller side does not exceed the rank and groups with ``rank=None``
    get AdamW with a learning rate of its own, which stays at the ratio adamw_lr / lr of the group's ``lr``.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate of matrices, a number >= 0 or a one-element tensor.
        betas: decay of M and p, and of V, each in [0, 1).
        eps: added to sqrt(V), >= 0, and AdamW's.
        weight_decay: decoupled, >= 0; of matrices too, where the paper has none.
        rank: columns of U, >= 1; None is AdamW.
        leading: how many of them are eigenvectors, >= 1, at most all; None is all.
        beta3: decay of C, in [0, 1).
        update_proj_gap: updates between two refreshes of U, >= 1.
        scale: factor of the step on matrices, >= 0.
        compensation: factor of S, >= 0.
        limiter_gamma: how much ||S|| may grow in a step, >= 1; None is no limit.
        start: where the first U starts from: "randomized" (a Gaussian sketch) or "svd".
        adamw_lr: learning rate of AdamW while ``lr`` has its initial value; None is ``lr``.
        adamw_betas: AdamW's.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Gong et al. 2025 (arXiv 2502.07752), Alice. AdamW's learning rate is that of RACS in the same paper.

    Deviations: the printed iteration returns E alone, which has the wrong shape; U E is meant. The first U, which the
    paper leaves at zero, starts from the first gradient. Eigenvectors turn towards those before them, whose sign is
    free. Where fewer than rank - leading directions are orthogonal to U, random ones are orthogonal to the leading ones
    only. sqrt(V) gets an eps; of a row that has no residual but rounding S is zero. The limiter is that of
    :class:`FiraAdamW`. Convolutions are matrices (out, in * kernel).
    """

    triple = Parts(TrackedEigen(), TrackingAdam(), Compensation())
    full_rank = OtherAdamW()
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        leading: int | None = 40,
        beta3: float = 0.999,
        update_proj_gap: int = 200,
        scale: float = 0.3,
        compensation: float = 0.4,
        limiter_gamma: float | None = 1.01,
        start: str = "randomized",
        adamw_lr: float | Tensor | None = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
