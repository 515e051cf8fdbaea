"""LoRA-Pre: Adam whose moments are products of two thin factors that follow the gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.chunks import chunks
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import Common, arguments, number, one_of
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, Scalar, Slot, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import CorrectedAdam, check_betas
from lowrank_optim.optim.subspaces.whole import Unchanged, Unprojected

KEYS = ("exp_avg", "exp_avg_sq")


def inverse_factor(thin: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of Xᴴ X + d I for X (..., k, rank), d being ``damping`` times the trace of Xᴴ X."""
    gram = thin.mH @ thin
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1, keepdim=True)
    gram.diagonal(dim1=-2, dim2=-1).add_(trace * damping + torch.finfo(gram.dtype).tiny)
    # Unlike cholesky it does not look, for which the host would wait.
    return torch.linalg.cholesky_ex(gram).L


def follow_(thin: Tensor, image: Tensor, factor: Tensor, gamma: float) -> None:
    """X <- (1 - gamma) X + gamma image (L Lᴴ)⁻¹."""
    thin.lerp_(torch.cholesky_solve(image.mH, factor).mH, gamma)


class FactoredMoments(Lift):
    """Adam's direction from factored moments; the state holds B and A of M = B Aᴴ and of sqrt(V) = B Aᴴ."""

    options = {
        "betas": Option(check_betas, (0.9, 0.999)),
        "eps": Option(number(), 1e-8),
        "scale": Option(number(), 0.25),
        "damping": Option(number(), 1e-6),
        "debias": Option(one_of("published", "factor"), "published"),
    }

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        *batch, rows, columns = shape
        slots: Slots = {}
        for key, dtype in zip(KEYS, (view.wide, view.wide.to_real())):
            slots[f"{key}.left"] = Slot((*batch, rows, group["rank"]), dtype, "rows")
            slots[f"{key}.right"] = Slot((*batch, columns, group["rank"]), dtype, "columns", std=0.02)
        return slots

    def update(self, step: Step, state: State, group: Group) -> Update:
        """The one tensor of the weight's size is the update; both moments are rebuilt some rows at a time."""
        beta1, beta2 = group["betas"]
        gammas = 1 - beta1**0.5, 1 - beta2**0.25
        left, right = ([state[f"{key}.{side}"] for key in KEYS] for side in ("left", "right"))
        of_left, of_right = ([inverse_factor(thin, group["damping"]) for thin in side] for side in (left, right))
        images = [torch.zeros_like(thin) for thin in right]
        old, fresh = self._weights(state["step"], beta2, group["debias"])
        first = group["scale"] / (1 - beta1 ** state["step"])
        update = torch.empty_like(step.grad, dtype=left[0].dtype)
        for out, some, *thin in chunks(update, step.grad, *left):
            grad = zero_unless(step.ok, some).to(update.dtype)
            sizes = grad.abs()
            mean = (thin[0] @ right[0].mH).mul_(beta1).add_(grad, alpha=1 - beta1)
            root = (thin[1] @ right[1].mH).square_().mul_(old).add_(sizes.square() * fresh).sqrt_()
            out.copy_(mean.mul_(first).div_(root.add_(group["eps"])))
            # All from the factors before the step.
            for i, target in enumerate((grad, sizes)):
                images[i] += target.mH @ thin[i]
                follow_(thin[i], target @ right[i], of_right[i], gammas[i])
        for i in range(2):
            follow_(right[i], images[i], of_left[i], gammas[i])
        return Update(full=update)

    def _weights(self, t: int | Tensor, beta2: float, debias: str) -> tuple[Scalar, Scalar]:
        """What (B Aᴴ)² and G² are multiplied with."""
        if debias == "published":
            correction = 1 / (1 - beta2**t)
            return beta2 * correction, (1 - beta2) * correction
        # Nothing at the first step, when the factors are zero and G² stands alone.
        grown = 1 - beta2 ** ((t - 1) / 2)
        # The sum has the dtype of the counter, whatever torch's default.
        later = (t > 1) + 0 * t
        return beta2 / (grown**2 + 1e-30), 1 - beta2 * later


class LoRAPre(LowRankOptimizer):
    """Adam with moments of rank ``rank`` for matrices, each a product of two thin factors; AdamW for the rest.

    For a weight W (m, n) with gradient G, with gamma1 = 1 - sqrt(beta1), gamma2 = 1 - beta2^(1/4), and factors B (m,
    rank), zero, and A (n, rank), drawn from N(0, 0.02²), one pair a moment::

        M = beta1 B Aᵀ + (1 - beta1) G
        V = beta2 (B' A'ᵀ)² + (1 - beta2) G²
        W = (1 - lr weight_decay) W
        W = W - lr scale (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps)
        B, A = (1 - gamma1) B + gamma1 G A (Aᵀ A + d)⁻¹,  (1 - gamma1) A + gamma1 Gᵀ B (Bᵀ B + d)⁻¹
        B', A' = the same with |G| and gamma2

    Only one tensor as large as W is made. Embeddings, heads, vectors, matrices whose smaller side does not exceed the
    rank and groups with ``rank=None`` get AdamW with the same lr.

    The bias correction is wrong for V: B' A'ᵀ grows as 1 - beta2^(t/2), and is then squared. With beta2 = 0.999 the
    steps are up to six times too long around t = 100. ``debias="factor"`` divides B' A'ᵀ by 1 - beta2^((t-1)/2)
    instead. In 400 updates of a small LLaMA (docs/choosing.md) it trains well at AdamW's learning rate, at which the
    published correction ends at a perplexity of 420; that one needs an eighth of the rate.

    Args:
        params: tensors (every matrix), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the corrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of every factor, >= 1; None is AdamW.
        scale: factor of the step on matrices, >= 0.
        damping: d as a share of the trace of the matrix that it is added to, >= 0.
        debias: "published" or "factor".
        common: stagger (without effect), state_dtype (of AdamW; factors are always fp32), weight_rounding, maximize,
            capturable, backend; see :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: LoRA-Pre 2026 (arXiv 2602.24283), Adam variant. The authors' code is not published, and re-implementations
    differ in the order of the step: here M and V are made of the factors before the step and the fresh gradient, and A
    and B follow from each other's old value. That order, eps beside the root, betas and lr are not established.

    Deviations: decay goes by lr, in the paper by lr scale. d is relative, because Bᵀ B goes as the square of the
    gradient; in the paper it is 1e-6 itself. Experts are a batch of matrices, convolutions matrices (out, in * kernel).
    """

    triple = Parts(Unprojected(), Unchanged(), FactoredMoments())
    full_rank = CorrectedAdam()
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
        scale: float = 0.25,
        damping: float = 1e-6,
        debias: str = "published",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
