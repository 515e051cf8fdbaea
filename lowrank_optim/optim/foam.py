"""FOAM: Adam on means over blocks of neighbouring inputs, and what they leave of the present gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.chunks import chunks
from lowrank_optim.ops.fold import fold, unfold
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import Common, arguments, natural, number, one_of
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, Scalar, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.state_storage import load_moment, moment_slots, store_moment_
from lowrank_optim.optim.subspaces.whole import Unchanged, Whole

ADAM = Adam()


class FoldedCorrection(Unchanged):
    """Adam's bias correction, of moments that the lift keeps."""

    options = Adam.options

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        return ADAM.correction(step, group)


class ResidualInside(Lift):
    """Moments of block means; the residual of the present gradient stands in numerator and denominator.

    Its own denominator stands at every element, so that the whole update is made, in one new tensor.
    """

    options = {
        "level": Option(natural, 2),
        "scale": Option(number(), 0.25),
        "residual": Option(number(), 1.0),
        "second_moment": Option(one_of("block", "mean"), "block"),
    }

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        folded, stored = (*shape[:-1], -(-shape[-1] // 2 ** group["level"])), group["state_dtype"]
        return {
            **moment_slots("exp_avg", folded, view.wide, stored, "rows"),
            **moment_slots("exp_avg_sq", folded, view.wide.to_real(), stored, "rows"),
        }

    def update(self, step: Step, state: State, group: Group) -> Update:
        (beta1, beta2), size, rho = group["betas"], 2 ** group["level"], group["residual"]
        first, second = (load_moment(state, key, step.grad.dtype) for key in ("exp_avg", "exp_avg_sq"))
        update, columns = torch.empty_like(step.grad, dtype=first.dtype), step.grad.shape[-1]
        for out, some, m, v in chunks(update, step.grad, first, second):
            grad = zero_unless(step.ok, some).to(first.dtype)
            mean = fold(grad, size)
            rest = (grad - unfold(mean, size, columns)).mul_(rho)
            square = mean.abs().square() if group["second_moment"] == "mean" else fold(grad.abs().square(), size)
            m.lerp_(mean, 1 - beta1)
            v.lerp_(square, 1 - beta2)
            root = (unfold(v, size, columns) + rest.abs().square()).sqrt_().add_(group["eps"])
            torch.div(rest.add_(unfold(m, size, columns)), root, out=out)
        store_moment_(state, "exp_avg", first)
        store_moment_(state, "exp_avg_sq", second)
        return Update(full=update.mul_(group["scale"]))


class FOAM(LowRankOptimizer):
    """Adam whose moments are those of means over 2^level neighbouring columns; full Adam for everything else.

    For a weight W (m, n) with gradient G, fold the mean over blocks of 2^level columns (the last one of what there
    is), and U its inverse, which repeats::

        A = fold(G);  R = residual (G - U(A))
        M = beta1 M + (1 - beta1) A                    # (m, n / 2^level)
        V = beta2 V + (1 - beta2) fold(G²)             # second_moment="mean": A²
        N = (U(M) + R) / (sqrt(U(V) + R²) + eps)
        W = W - lr sqrt(1 - beta2^t) / (1 - beta1^t) scale N
        W = (1 - lr weight_decay) W

    Embeddings, heads, vectors and groups with ``rank=None`` get Adam with the same lr, without ``scale``.

    Args:
        params: tensors (every matrix counts), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected root, >= 0.
        weight_decay: decoupled, >= 0.
        level: log2 of the columns of a block, >= 0; 0 is Adam.
        scale: factor of the step on matrices, >= 0.
        residual: factor of R, >= 0.
        second_moment: "block", of the squares, as in the authors' code, or "mean", the squares of the means, as in the
            paper; with gradients without a mean the latter's steps are 1.3 times longer.
        common: stagger (without effect), state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: FOAM 2025 (arXiv 2512.07112). The default of eps could not be established.

    Deviations: a last block of fewer columns is averaged over these, in the published code as if zeros followed.
    Convolutions are matrices (out, in * kernel).
    """

    triple = Parts(Whole(), FoldedCorrection(), ResidualInside())

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        level: int = 2,
        scale: float = 0.25,
        residual: float = 1.0,
        second_moment: str = "block",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"rank": 1, **arguments(locals())})
