"""SinkGD: gradient descent along a gradient whose rows and columns all have the same norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.two_sided import sinkhorn_scales
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import Common, arguments, number, positive_int
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, State, Step, Update
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.subspaces.whole import Unchanged, Whole


class Balanced(Lift):
    """The gradient between scales of its rows and columns; there is no state."""

    options = {"iterations": Option(positive_int, 5), "scale": Option(number(), 0.05)}

    def update(self, step: Step, state: State, group: Group) -> Update:
        scales = sinkhorn_scales(step.grad, group["iterations"])
        rows, columns = (zero_unless(step.ok, scale) for scale in scales)
        return Update(row_scale=rows * group["scale"], column_scale=columns)


class SinkGD(LowRankOptimizer):
    """Stateless steps on matrices, with equal norms of all rows and of all columns; AdamW for everything else.

    For a weight W (m, n) with gradient G, ``iterations`` times::

        X_i: = sqrt(n) X_i: / ||X_i:||                 # rows, of X = G at first
        X_:j = sqrt(m) X_:j / ||X_:j||                 # then columns
        W = (1 - lr weight_decay) W
        W = W - lr scale X

    X = diag(a) G diag(b) is never formed: one pass over G an iteration finds a and b, one over G and W moves W.
    Zero rows and columns stay zero, and so does what is below 1e-18 of the largest entry. Embeddings, heads, vectors
    and groups with ``rank=None`` get AdamW.

    Args:
        params: tensors (every matrix counts), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of AdamW's two moments, each in [0, 1).
        eps: AdamW's, >= 0.
        weight_decay: decoupled, >= 0.
        iterations: of both normalisations, >= 1.
        scale: factor of the step on matrices, >= 0.
        common: stagger (without effect), state_dtype (of AdamW), weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Scetbon et al. 2025 (arXiv 2502.06742). The learning rate of the paper could not be established: lr, scale
    and iterations are those of its implementation in axolotl.

    Deviations: decay goes by lr; there by lr scale, 20 times less. Scales are fp32 vectors, there the iterate is
    rounded to the gradient's dtype. Instead of a clamp of norms at 1e-8, a zero norm gives the scale zero. Experts are
    a batch of matrices, convolutions are matrices (out, in * kernel).
    """

    triple = Parts(Whole(), Unchanged(), Balanced())
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
        iterations: int = 5,
        scale: float = 0.05,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"rank": 1, **arguments(locals())})
