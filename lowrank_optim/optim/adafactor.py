"""GaLore with Adafactor: factored second moments in the dominant singular subspace of the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.adafactor_direction import root_mean_square
from lowrank_optim.optim.galore import GaLore
from lowrank_optim.optim.lifts.plain import Plain
from lowrank_optim.optim.options import Common, arguments, flag, number, one_of, optional
from lowrank_optim.optim.parts import Group, Option, Parts, Rule, Scalar, State, add_
from lowrank_optim.optim.plans import Plan
from lowrank_optim.optim.rules.adafactor import Adafactor
from lowrank_optim.optim.state_storage import load_moment, store_moment_
from lowrank_optim.optim.subspaces.singular import TopSingular
from lowrank_optim.optim.weight_storage import value_of


class GaLoreAdafactor(GaLore):
    """Adafactor whose factored moments live in the dominant singular subspace of the gradient.

    P is that of :class:`lowrank_optim.GaLoreAdamW`. With t counted from 1::

        R = G P                                            # (m, rank)
        w = t^decay_rate
        row = (1 - w) row + w mean_j(R² + eps[0])          # (m,)
        col = (1 - w) col + w mean_i(R² + eps[0])          # (rank,)
        U = R / sqrt(row colᵀ / mean(row))
        U = a U / max(1, RMS(U) / clip_threshold)
        A = beta1 A + (1 - beta1) U                        # with beta1; else A = U
        W = (1 - a weight_decay) W
        W = W - scale A Pᵀ

    with the step size a = lr, or min(1e-2, 1/sqrt(t)) where lr is None (min(1e-6 t, 1/sqrt(t)) with ``warmup_init``),
    times max(eps[1], RMS(W)) with ``scale_parameter``. Parameters that are not compressed follow the same formulas with
    P = I and scale = 1; vectors keep their whole second moment.

    Args:
        params: as :class:`lowrank_optim.GaLoreAdamW` takes them.
        lr: learning rate, a number >= 0, a one-element tensor, or None for the relative step.
        eps: two numbers: added to R² (> 0), and the least scale of a parameter (>= 0).
        clip_threshold: largest root mean square of an unscaled update, > 0.
        decay_rate: exponent of the averages' weight, <= 0.
        beta1: decay of the mean update, in [0, 1); None keeps none.
        weight_decay: decoupled, >= 0.
        scale_parameter: multiply the step size by the root mean square of the weight.
        relative_step: True requires lr=None, False an lr; None follows lr.
        warmup_init: let the relative step grow from 1e-6.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two refreshes of P, >= 1.
        scale: factor of the lifted update, >= 0.
        proj_type, refresh, selection, moments: as in :class:`lowrank_optim.GaLoreAdamW`.
        common: stagger, state_dtype (of A and of the vectors' second moments; row and col are always fp32),
            weight_rounding, maximize, capturable, backend; see :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, lr beside relative_step, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507) with Shazeer, Stern 2018 (arXiv 1804.04235), algorithm 5.

    Deviations: the published default ``relative_step=True`` refuses an lr; here an lr alone turns it off. P comes from
    a randomized method unless ``refresh="svd"``. As in the published code: A averages updates that already carry their
    step size, decay comes before the update (GaLoreAdamW: after). The published C4 runs set ``scale_parameter=False``.
    """

    triple = Parts(TopSingular(), Adafactor(), Plain())
    full_rank = Adafactor()
    decay_first = True
    options = {
        **GaLore.options,
        "lr": Option(optional(number())),
        "scale_parameter": Option(flag, True),
        "relative_step": Option(one_of(None, True, False), None),
        "warmup_init": Option(flag, False),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
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

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        relative = group["lr"] is None
        if group["relative_step"] not in (None, relative):
            raise ValueError(
                f"Invalid relative_step: {group['relative_step']} with lr={group['lr']}, "
                "expected True exactly where lr is None"
            )
        if group["warmup_init"] and not relative:
            raise ValueError(f"Invalid warmup_init: {group['warmup_init']} with lr={group['lr']}, expected lr=None")

    def step_size(self, plan: Plan, param: Tensor, group: Group) -> tuple[Scalar, Scalar]:
        """The step size of one parameter, a tensor where it depends on the weight, and what decay leaves."""
        size: Scalar = group["lr"]
        step = plan.state["step"]
        if size is None:
            ceiling = 1e-6 * step if group["warmup_init"] else 1e-2
            decayed = step**-0.5
            size = decayed.clamp(max=ceiling) if isinstance(decayed, Tensor) else min(ceiling, decayed)
        if group["scale_parameter"]:
            per_matrix = plan.view.kind == "stack"
            if plan.layout is None:
                rms = root_mean_square(value_of(param), per_matrix=per_matrix)
            else:
                rms = plan.layout.root_mean_square(param, per_matrix=per_matrix)
            size = rms.clamp_(min=group["eps"][1]) * size
        return size, self.kept_by_decay(size, group)

    def direction(
        self, rule: Rule, low: Tensor, state: State, group: Group, size: Scalar, **told: Any
    ) -> tuple[Tensor, Scalar]:
        """U; or with ``beta1`` the mean of the updates, in which each has its own step size."""
        direction = rule.direction(low, state, group, **told)
        if group["beta1"] is None:
            return direction, size
        # The mean is of updates, not of directions: a step size of zero must leave a mean of zero behind.
        mean = load_moment(state, "exp_avg", direction.dtype)
        mean.lerp_(direction.mul_(size), 1 - group["beta1"])
        store_moment_(state, "exp_avg", mean)
        return mean, 1.0

    def add_direction_(
        self, target: Tensor, rule: Rule, grad: Tensor, state: State, group: Group, size: Scalar, sign: float
    ) -> None:
        direction, remaining = self.direction(rule, grad, state, group, size)
        add_(target, direction, sign * remaining)
