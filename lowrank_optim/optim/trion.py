"""Trion: orthogonalised momentum on the columns of a fixed basis in which it is largest."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.lifts.momentum import Momentum
from lowrank_optim.optim.options import Common, arguments
from lowrank_optim.optim.parts import Group, Parts
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.rules.newton_schulz import NewtonSchulz
from lowrank_optim.optim.subspaces.fixed_basis import Coefficients, Settings
from lowrank_optim.optim.two_rates import TwoRates


class Unrotated(Coefficients):
    """Selected coefficients of a momentum that is kept in all of them: there are no moments to move."""

    options = {key: option for key, option in Coefficients.options.items() if key != "rotate"}

    def settings(self, group: Group) -> Settings:
        return Settings(group["basis"], group["ell_norm"], group["similarity"], rotate=False)


class Trion(TwoRates):
    """Orthogonalised low-rank momentum for matrices, AdamW for everything else.

    For a weight W (m, n) with n <= m (else all of it transposed), gradient G and an orthogonal basis D (n, n),
    at updates 1, 1 + gap, ... I becomes the ``rank`` columns of S of greatest norm. Then::

        S = (B + G) D                                  # B: momentum
        R = S_I
        B = B + G - (1 - momentum) R D_Iᵀ              # what is not used does not decay
        N = NewtonSchulz(R)                            # (m, rank)
        W = (1 - lr weight_decay) W
        W = W - lr scale N D_Iᵀ

    Embeddings, heads, vectors, matrices whose smaller side does not exceed the rank and groups with ``rank=None`` get
    AdamW, with a learning rate of its own: it stays at the ratio adamw_lr / lr of the group's ``lr``, so that a
    schedule drives both. A group that names its ``lr`` and no ``adamw_lr`` keeps it for all of its parameters.

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
        adamw_lr: learning rate of AdamW while ``lr`` has its initial value; None is ``lr``.
        common: stagger, state_dtype ("int4" is for AdamW alone), weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Modoranu et al. 2025 (arXiv 2505.17967); Newton-Schulz: Jordan et al. 2024.

    Deviations: the published code scores by the 1-norm (``ell_norm=1``) and has the basis "dct3" where n <= m and
    "dct2" where not; here the basis does not depend on the side and is exact. B is kept as B D. Selections come at
    1 + k gap; published is a gap of 1.
    """

    triple = Parts(Unrotated(), NewtonSchulz(), Momentum())
    full_rank = CorrectedAdam()
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
        adamw_lr: float | Tensor | None = 3e-4,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
