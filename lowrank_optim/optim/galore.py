"""GaLore: Adam in the dominant singular subspace of the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.plain import Plain
from lowrank_optim.optim.options import Common, arguments, one_of
from lowrank_optim.optim.parts import Group, Option, Parts, View
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.subspaces.oriented import SIDES
from lowrank_optim.optim.subspaces.singular import TopSingular
from lowrank_optim.optim.subspaces.tucker import Tucker

TUCKER = Tucker()


class GaLore(LowRankOptimizer):
    """What GaLore's optimizers share: convolutions, and ``proj_type="full"``, are compressed along every long axis."""

    triple = Parts(TopSingular(), Adam(), Plain())
    others = (TUCKER,)
    options = {"proj_type": Option(one_of(*SIDES, "full"), "std")}

    def parts(self, view: View, group: Group) -> Parts:
        """Tucker for convolutions and for ``proj_type="full"``."""
        several = view.kind == "convolution" or group["proj_type"] == "full"
        return self.triple._replace(subspace=TUCKER) if several else self.triple


class GaLoreAdamW(GaLore):
    """AdamW whose moments live in the dominant singular subspace of the gradient.

    For a weight W (m, n) with gradient G, at updates 1, 1 + gap, 1 + 2 gap, ... P becomes the ``rank`` dominant
    singular vectors of G on its smaller side (n <= m: G P; else Gᵀ P). Then::

        R = G P                                        # (m, rank)
        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) R²
        N = M / (sqrt(V) + eps)
        W = W - lr sqrt(1 - beta2^t) / (1 - beta1^t) scale N Pᵀ
        W = (1 - lr weight_decay) W

    Tensors of more dimensions are compressed along every axis longer than the rank (Tucker). Parameters that
    are not compressed (vectors, sides not exceeding the rank, groups with ``rank=None``) follow the same formulas with
    P = I and scale = 1.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()`` (embeddings, head, norms and
            biases stay full-rank), :func:`low_rank_groups`, or groups as the published package takes them.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two refreshes of P, >= 1.
        scale: factor of the lifted update, >= 0.
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns,
            "full" both.
        refresh: "power" (one subspace iteration from the previous P, the first from a Gaussian sketch),
            "randomized" (a new Gaussian sketch with two power iterations) or "svd" (exact; no better in
            docs/choosing.md).
        moments: "keep" (as published), "align" (kept; each new column's sign turned towards the old one's) or "rotate"
            (moved by the overlap of the two bases). Neither of the latter lowers the loss of a small LLaMA beyond the
            spread over seeds (docs/choosing.md, benchmarks/results/moments.json), so the default is the published one.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507), algorithm 2.

    Deviations: P comes from a randomized method unless ``refresh="svd"``, which reproduces the published trajectories.
    Moments are fp32 where the published code takes the gradient's dtype. A rank of at least the smaller side is the
    full-rank rule, without scale. A zero or non-finite gradient never sets a basis. As in the published code, unlike
    in the paper: eps stands beside the uncorrected sqrt(V), decay comes after the update, moments stay at a refresh.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "power",
        selection: str = "top",
        moments: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))


class GaLoreAdamW8bit(GaLoreAdamW):
    """:class:`GaLoreAdamW` whose moments are stored in bitsandbytes' blockwise 8-bit format.

    Every 256 consecutive values of a moment share an fp32 scale; each is one of the 256 codes of the dynamic map,
    signed for M and unsigned for V. A step reads them as fp32, computes as :class:`GaLoreAdamW` does, direction
    included, and writes M and V back to the nearest codes. Moments of fewer than 4096 values stay fp32, and so do those
    of a group with ``state_dtype="float32"``, such as one of embeddings. bitsandbytes is not required.

    Args:
        params, lr, betas, rank, update_proj_gap, scale, proj_type, refresh, selection, moments: as in
            :class:`GaLoreAdamW`, and so are the common stagger, state_dtype ("int8" here), weight_rounding, maximize,
            capturable and backend.
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0; not zero by default, as published.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507), section 4.3; Dettmers et al. 2022 (arXiv 2110.02861).

    Deviations: the published class calls bitsandbytes' Adam, which adds eps after the bias correction; here it stands
    beside the uncorrected sqrt(V), which is eps / sqrt(1 - beta2^t) on the corrected scale (3e-7 at the first step,
    1e-8 from the 5000th). Decay comes after the update for all parameters, there only for compressed ones. Blocks run
    along the rows of the low-rank gradient with the compressed side last, there along those of its own orientation. The
    published class under bitsandbytes 0.50 freezes moments of fewer than 4096 values; here they are updated. The other
    deviations are those of :class:`GaLoreAdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "power",
        selection: str = "top",
        moments: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, **{"state_dtype": "int8", **arguments(locals())})
