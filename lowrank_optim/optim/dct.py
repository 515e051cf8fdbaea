"""DCT-AdamW: Adam on the columns of a fixed basis in which the gradient is largest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.int8_blocks import blocks, dequantize, quantize_
from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice
from lowrank_optim.optim.columns import COEFFICIENTS, Columns, add_coefficients_, coefficients
from lowrank_optim.optim.moments import init_moment, load_moment, replace_moment_, unseen_finite
from lowrank_optim.optim.protocols import IDENTITY, Group, State, Subspace
from lowrank_optim.optim.rules import CorrectedAdam

ERROR_FEEDBACKS = (None, "full", "int8")


def transforms(group: Group) -> bool:
    """Whether every step needs all coefficients of the gradient: for a selection, or to keep those left out."""
    return group["update_proj_gap"] == 1 or group["error_feedback"] is not None


class ErrorFeedback:
    """What the selected columns leave of a gradient is added to the next one.

    All of it happens in coefficients, S = G D + E, where the error is S with the selected columns set to zero:
    no product forms the residual, and S is the only full-size temporary. ``error`` is E, stored as
    ``state_dtype`` says; or ``error.codes`` and ``error.scale`` hold it in linear blockwise int8.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on an unknown error_feedback."""
        check_choice("error_feedback", group["error_feedback"], ERROR_FEEDBACKS)

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """A zero error, (rows, d)."""
        if group["error_feedback"] is None:
            return
        shape = subspace.orient(param, state).shape
        dtype = torch.promote_types(param.dtype, torch.float32)
        if group["error_feedback"] == "full":
            init_moment(state, "error", shape, dtype, param.device, group["state_dtype"])
            return
        # A complex number is two values.
        shape = torch.Size((*shape, 2)) if dtype.is_complex else shape
        state["error.codes"] = torch.zeros(shape, dtype=torch.int8, device=param.device)
        state["error.scale"] = torch.zeros(blocks(state["error.codes"].numel()), device=param.device)

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The gradient's coefficients and the error, where the step needs all of them; else the gradient."""
        if not transforms(group):
            return grad
        if group["error_feedback"] is None:
            return coefficients(grad, group)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        if group["error_feedback"] == "full":
            total = load_moment(state, "error", grad.dtype).clone()
        else:
            total = dequantize(state["error.codes"], state["error.scale"], dtype.to_real())
            total = torch.view_as_complex(total) if dtype.is_complex else total
        add_coefficients_(total, grad, group)
        return total

    def reads_gradient(self, group: Group) -> bool:
        """Only for its transform."""
        return transforms(group)

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """target += alpha * up(direction); the error becomes what was not selected. ``grad`` is used up."""
        subspace.add_up_(target, direction, state, group, alpha=alpha)
        if group["error_feedback"] is None:
            return
        finite = unseen_finite(grad)
        grad.index_fill_(-1, state["indices"], 0)
        if group["error_feedback"] == "full":
            replace_moment_(state, "error", grad, where=finite)
        else:
            values = torch.view_as_real(grad) if grad.is_complex() else grad
            quantize_(state["error.codes"], state["error.scale"], values, where=finite)


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
        basis: "dct2", "dct3", "identity" (rows or columns of the gradient itself) or "random".
        ell_norm: the norm that scores columns, 2 (keeps the most energy) or 1.
        rotate: move the moments with their columns; False leaves them where they are.
        error_feedback: None, "full" (E stored as the moments are) or "int8" (E in int8, one fp32 scale for 128 values).
        similarity: how S is computed: "matmul", "fft" (a DCT basis only) or "auto", the faster by measurement.
        state_dtype: storage of moments and of a full error: "float32", "bfloat16" (stochastically rounded) or
            "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        stagger: spread the selections of the parameters over the gap instead of one step for all.
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

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

    subspace = Columns()
    rule = CorrectedAdam()
    lift = ErrorFeedback()
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
                "update_proj_gap": update_proj_gap,
                "basis": basis,
                "ell_norm": ell_norm,
                "rotate": rotate,
                "error_feedback": error_feedback,
                "similarity": similarity,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "stagger": stagger,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )

    def subspace_of(self, param: Tensor, group: Group) -> Subspace:
        """On coefficients where the lift has transformed the gradient."""
        subspace = super().subspace_of(param, group)
        return COEFFICIENTS if subspace is not IDENTITY and transforms(group) else subspace
