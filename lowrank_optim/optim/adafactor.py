"""GaLore with Adafactor: factored second moments in the dominant singular subspace of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adafactor_direction import adafactor_direction, clip_rms_, root_mean_square, square_of
from lowrank_optim.optim.checks import check_choice, check_range
from lowrank_optim.optim.galore import GaLore
from lowrank_optim.optim.moments import init_moment, load_moment, store_moment_
from lowrank_optim.optim.protocols import Group, Lift, State, Subspace


class Adafactor:
    """Adafactor's clipped direction (Shazeer, Stern 2018, arXiv 1804.04235, algorithms 4 and 5).

    Gradients of two or more dimensions have their second moment as row and column means, vectors as it is. The moments
    are fp32 whatever the parameter's dtype (fp64 for fp64); ``state_dtype`` stores those of a gradient's shape in fewer
    bits. The decay 1 - t^decay_rate starts at 0, so there is no bias to correct.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on eps, clip_threshold, decay_rate or beta1 out of range."""
        eps = group["eps"]
        if not isinstance(eps, (tuple, list)) or len(eps) != 2:
            raise ValueError(f"Invalid eps: {eps!r}, expected two numbers")
        # Of a zero second moment the inverse root would be infinite.
        tiny = torch.finfo(torch.float32).tiny
        check_range("eps[0]", eps[0], low=tiny)
        check_range("eps[1]", eps[1], low=0.0)
        check_range("clip_threshold", group["clip_threshold"], low=tiny)
        check_range("decay_rate", group["decay_rate"], low=float("-inf"), high=0.0)
        if group["beta1"] is not None:
            check_range("beta1", group["beta1"], low=0.0, high=1.0, high_open=True)

    def init(self, like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
        """Zero factors of the second moment; the mean update only where ``beta1`` asks for it."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        real, device = dtype.to_real(), like.device
        if len(shape) >= 2:
            # Too small for fewer bits to matter.
            state["exp_avg_sq_row"] = torch.zeros(shape[:-1], dtype=real, device=device)
            state["exp_avg_sq_col"] = torch.zeros((*shape[:-2], shape[-1]), dtype=real, device=device)
        else:
            init_moment(state, "exp_avg_sq", shape, real, device, group["state_dtype"])
        if group["beta1"] is not None:
            init_moment(state, "exp_avg", shape, dtype, device, group["state_dtype"])

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """U, the second moment being updated in place."""
        low = low.to(torch.promote_types(low.dtype, torch.float32))
        weight = state["step"] ** group["decay_rate"]
        if isinstance(weight, Tensor):
            weight = weight.to(low.real.dtype)
        eps, threshold = group["eps"][0], group["clip_threshold"]
        if "exp_avg_sq_row" not in state:
            second = load_moment(state, "exp_avg_sq", low.dtype).lerp_(square_of(low).add_(eps), weight)
            store_moment_(state, "exp_avg_sq", second)
            return clip_rms_(low * second.rsqrt(), threshold)
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        operation = pick(adafactor_direction, group["backend"], low.device)
        return operation(low, row, col, weight=weight, eps=eps, clip_threshold=threshold)

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
        """1: the first average is the first gradient."""
        return 1.0

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """col <- col |O|² and A <- A O with the overlap O, or both gathered by column; row means stay.

        A column without a predecessor takes the mean of the others: a factor of zero would make the next
        direction infinite.
        """
        col, by_column = state["exp_avg_sq_col"], overlap.dtype == torch.int64
        if by_column:
            gone = overlap < 0
            moved = col.index_select(-1, overlap.clamp_min(0))
            col.copy_(torch.where(gone, col.mean(-1, keepdim=True), moved))
        else:
            col.copy_(col @ overlap.abs().square().to(col.dtype))
        if group["beta1"] is not None:
            mean = load_moment(state, "exp_avg", col.dtype)
            if by_column:
                mean_moved = mean.index_select(-1, overlap.clamp_min(0)).masked_fill_(gone, 0)
            else:
                mean_moved = mean @ overlap.to(mean.dtype)
            store_moment_(state, "exp_avg", mean_moved)


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
        proj_type, refresh, selection, moments, stagger, weight_rounding, maximize, capturable, backend: as in
            :class:`lowrank_optim.GaLoreAdamW`.
        state_dtype: storage of A and of the vectors' second moments: "float32", "bfloat16" or "int8"; row and col are
            always fp32.

    Raises:
        ValueError: an argument out of range, lr beside relative_step, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507) with Shazeer, Stern 2018 (arXiv 1804.04235), algorithm 5.

    Deviations: the published default ``relative_step=True`` refuses an lr; here an lr alone turns it off. P comes from
    a randomized method unless ``refresh="svd"``. As in the published code: A averages updates that already carry their
    step size, decay comes before the update (GaLoreAdamW: after). The published C4 runs set ``scale_parameter=False``.
    """

    rule = Adafactor()

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
        stagger: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": eps,
                "clip_threshold": clip_threshold,
                "decay_rate": decay_rate,
                "beta1": beta1,
                "weight_decay": weight_decay,
                "scale_parameter": scale_parameter,
                "relative_step": relative_step,
                "warmup_init": warmup_init,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "scale": scale,
                "proj_type": proj_type,
                "refresh": refresh,
                "selection": selection,
                "moments": moments,
                "stagger": stagger,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )

    def _validate(self, group: Group) -> None:
        check_choice("relative_step", group["relative_step"], (None, True, False))
        relative = group["lr"] is None
        if group["relative_step"] not in (None, relative):
            raise ValueError(
                f"Invalid relative_step: {group['relative_step']} with lr={group['lr']}, "
                "expected True exactly where lr is None"
            )
        if group["warmup_init"] and not relative:
            raise ValueError(f"Invalid warmup_init: {group['warmup_init']} with lr={group['lr']}, expected lr=None")
        super()._validate({**group, "lr": 0.0} if relative else group)

    def update_(
        self, target: Tensor, grad: Tensor, low: Tensor, subspace: Subspace, lift: Lift, state: State, group: Group
    ) -> None:
        """Decay, direction, its running mean, lift."""
        size = step_size(target, state["step"], group)
        if group["weight_decay"] != 0:
            target.mul_(1 - size * group["weight_decay"])
        direction = self.rule.direction(low, state, group)
        sign = 1.0 if group["maximize"] else -1.0
        if group["beta1"] is not None:
            # The mean is of updates, not of directions: a step size of zero must leave a mean of zero behind.
            mean = load_moment(state, "exp_avg", direction.dtype)
            direction = mean.lerp_(direction.mul_(size), 1 - group["beta1"])
            store_moment_(state, "exp_avg", direction)
            size = 1.0
        lift.apply_(target, grad, low, direction, subspace, state, group, alpha=sign * size)


def step_size(weight: Tensor, step: int | Tensor, group: Group) -> float | Tensor:
    """The step size of one parameter at its update ``step`` (from 1), a tensor where it depends on the weight."""
    size: float | Tensor = group["lr"]
    if size is None:
        ceiling = 1e-6 * step if group["warmup_init"] else 1e-2
        decayed = step**-0.5
        size = decayed.clamp(max=ceiling) if isinstance(decayed, Tensor) else min(ceiling, decayed)
    if group["scale_parameter"]:
        size = root_mean_square(weight).clamp_(min=group["eps"][1]) * size
    return size
