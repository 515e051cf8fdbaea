"""DCT-AdamW: Adam on the columns of a fixed basis in which the gradient is largest."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.error_feedback import ErrorFeedback, transforms
from lowrank_optim.optim.options import Common, arguments
from lowrank_optim.optim.parts import Group, Parts, View
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.subspaces.fixed_basis import Coefficients, Columns

COEFFICIENTS = Coefficients()


class DCTAdamW(LowRankOptimizer):
    """AdamW on the columns of a fixed orthogonal basis, a discrete cosine basis, in which the gradient is largest.

    For a weight W (m, n) with n <= m (else all of it transposed), gradient G, error E and an orthogonal D (n, n),
    at updates 1, 1 + gap, 1 + 2 gap, ... I becomes the ``rank`` columns of S of greatest norm. Then::

        S = (G + E) D
        R = S_I ;  E = (S - R, the rest) Dᵀ            # E = 0 without error feedback
        M, V = their columns in the new I, 0 for a column that was not in the old one
        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) R²
        N = M / (sqrt(V) + eps sqrt(1 - beta2^t))
        W = (1 - lr weight_decay) W
        W = W - lr sqrt(1 - beta2^t) / (1 - beta1^t) N D_Iᵀ

    The state holds the ``rank`` column numbers instead of a basis. D is built once per size, dtype and device for the
    whole process and is in no state dict; it takes n² values (``columns.BUILT.clear()`` frees them).
    Parameters that are not compressed (vectors, tensors of more than two dimensions, sides not exceeding the rank,
    groups with ``rank=None``) follow the same formulas with D_I = 1.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()`` (embeddings, head, norms and
            biases stay full-rank), :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the bias-corrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: selected columns, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two selections, >= 1. More than 1 saves the transform of the gradient
            between them, unless there is error feedback.
        basis: "dct2", "dct3", "identity" (rows or columns of the gradient itself) or "random"; compared in
            docs/choosing.md, as is error feedback.
        ell_norm: the norm that scores columns, 2 (keeps the most energy) or 1.
        rotate: move the moments with their columns; False leaves them where they are.
        error_feedback: None, "full" (E stored as the moments are) or "int8" (E in int8, an fp32 scale for 128 values of
            a row).
        similarity: how S is computed: "matmul", "fft" (a DCT basis only) or "auto", the faster by measurement.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Modoranu et al. 2025 (arXiv 2505.17967).

    Deviations: ``basis="dct3", ell_norm=1`` is the published "matmul" mode, ``basis="dct2", ell_norm=1`` its "makhoul".
    The basis is exact (the published one is built in fp32, off by 1e-3 at 4096); column numbers ascend; moments
    move by default, by gather where the published product leaks into new columns; moments and error are fp32; int8 has
    255 levels where the published quantizer has 16; selections come at 1 + k gap, published at 1 and k gap. Each layer
    has a basis of its own size. A rank of at least the smaller side is the full-rank rule. Gradients stay as they are.
    """

    triple = Parts(Columns(), CorrectedAdam(), ErrorFeedback())
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
        update_proj_gap: int = 1,
        basis: str = "dct2",
        ell_norm: int = 2,
        rotate: bool = True,
        error_feedback: str | None = None,
        similarity: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))

    def parts(self, view: View, group: Group) -> Parts:
        """On coefficients where the lift has transformed the gradient."""
        return self.triple._replace(subspace=COEFFICIENTS) if transforms(group) else self.triple
