"""GoLore: GaLore whose basis is drawn at random once the gradient is mostly noise."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.lifts.plain import Plain
from lowrank_optim.optim.options import Common, arguments, natural
from lowrank_optim.optim.parts import Accumulation, Group, Option, Parts, Refresh, State, Which
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.state_storage import SALTS, load_moment, store_moment_
from lowrank_optim.optim.subspaces.random import random_basis
from lowrank_optim.optim.subspaces.singular import HalfIterations, TopSingular


def is_random(state: State, group: Group) -> bool:
    """Whether a refresh in or after the present update draws."""
    return int(state["step"]) >= group["random_from"]


class DrawnSums(HalfIterations):
    """Sums for GaLore's basis; a random one needs none."""

    def sketch(self, subspace: Any, grad: Tensor, state: State, group: Group) -> Tensor | None:
        return None if is_random(state, group) else super().sketch(subspace, grad, state, group)

    def refresh(
        self, subspace: Any, low: Tensor, sketch: Tensor | None, state: State, group: Group, which: Which,
        dtype: torch.dtype,
    ) -> Refresh:  # fmt: skip
        if sketch is None and is_random(state, group):
            result: Refresh = subspace.draw(low, state, group, which)
            return result
        return super().refresh(subspace, low, sketch, state, group, which, dtype)


class TopThenRandom(TopSingular):
    """GaLore's basis, and from the update ``random_from`` on a uniformly random one."""

    accumulation: ClassVar[Accumulation | None] = DrawnSums()
    options = {**TopSingular.options, "random_from": Option(natural, 8000)}

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        if is_random(state, group):
            return self.draw(grad, state, group, which)
        return super().refresh(grad, state, group, which)

    def draw(self, like: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """The next random basis, a function of seed and update."""
        key = mix_key(state["seed"], state["step"], SALTS["basis"])
        return self.replace_basis_(random_basis(like, state, key, group), state, group, which)


class FirstMomentMoves(Adam):
    """Adam whose first moment alone follows the basis."""

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        moment = load_moment(state, "exp_avg", torch.float32)
        store_moment_(state, "exp_avg", moment @ overlap.to(moment.dtype))


class GoLoreAdamW(LowRankOptimizer):
    """GaLore up to the update ``random_from``, then the same in a random basis, with a first moment that follows it.

    P, R, N and the update are those of :class:`GaLoreAdamW` on a weight W (m, n), n <= m (else on its transpose). At
    the updates 1, 1 + gap, ... there comes a new P (n, rank): the dominant singular vectors of G, or, once
    ``random_from`` updates have been made, a uniformly random matrix with orthonormal columns; and then::

        M = M P_oldᵀ P                                 # V stays

    A random basis looks at no gradient: with :func:`step_in_backward` it costs neither memory nor a second phase.

    Args:
        params: as for :class:`GaLoreAdamW`.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two refreshes of P, >= 1.
        random_from: updates before a refresh draws, >= 0; published: 80 % of the run, 8000 of 10,000 here.
        scale: factor of the lifted update, >= 0.
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns.
        refresh: of the first kind of basis: "power", "randomized" or "svd", as for :class:`GaLoreAdamW`.
        moments: what M does at a refresh: "rotate" (as above), "keep" or "align", as for :class:`GaLoreAdamW`.
        common: stagger, state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: He et al. 2024 (arXiv 2410.11289), GoLore.

    Deviations: those of :class:`GaLoreAdamW`. In the published optimizer the moved M serves the update of the refresh
    alone and is then lost; here it stays. Draws come from the parameter's name (or position) and the count of updates,
    so that all processes draw the same, not from a global generator. Convolutions are matrices (out, in * kernel).
    """

    triple = Parts(TopThenRandom(), FirstMomentMoves(), Plain())

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
        random_from: int = 8000,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "power",
        moments: str = "rotate",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, arguments(locals()))
