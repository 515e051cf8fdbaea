"""Adafactor's rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adafactor_direction import adafactor_direction, clip_rms_, square_of
from lowrank_optim.ops.move_columns import move_columns_
from lowrank_optim.optim.options import number, optional
from lowrank_optim.optim.parts import Group, Number, Option, Rule, Slot, Slots, State, View
from lowrank_optim.optim.state_storage import load_moment, moment_slots, store_moment_
from lowrank_optim.optim.validation import check_range

TINY = torch.finfo(torch.float32).tiny


def check_eps(name: str, eps: Any) -> None:
    """Raise ValueError unless ``eps`` are two numbers, the first above 0."""
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise ValueError(f"Invalid {name}: {eps!r}, expected two numbers")
    check_range(f"{name}[0]", eps[0], low=TINY)
    check_range(f"{name}[1]", eps[1], low=0.0)


class Adafactor(Rule):
    """Adafactor's clipped direction (Shazeer, Stern 2018, arXiv 1804.04235, algorithms 4 and 5).

    Gradients of two or more dimensions have their second moment as row and column means, vectors as it is. The moments
    are fp32 whatever the parameter's dtype (fp64 for fp64); ``state_dtype`` stores those of a gradient's shape in fewer
    bits. The decay 1 - t^decay_rate starts at 0, so there is no bias to correct.
    """

    options = {
        # Of a zero second moment the inverse root would be infinite.
        "eps": Option(check_eps, (1e-30, 1e-3)),
        "clip_threshold": Option(number(TINY), 1.0),
        "decay_rate": Option(number(float("-inf"), 0.0), -0.8),
        "beta1": Option(optional(number(0.0, 1.0, high_open=True)), None),
    }

    def slots(self, shape: tuple[int, ...], view: View, group: Group, along: str | None) -> Slots:
        """Factors of the second moment; the mean update only where ``beta1`` asks for it.

        ``batch`` counts the leading axes of a stack: every matrix of it is clipped for itself.
        """
        dtype = view.wide.to_real() if len(shape) > len(view.shape) else view.wide
        real = dtype.to_real()
        # A complex vector is seen as pairs of real numbers, and is no matrix.
        if len(view.shape) >= 2:
            # Too small for fewer bits to matter.
            slots: Slots = {
                "exp_avg_sq_row": Slot(shape[:-1], real, along),
                "exp_avg_sq_col": Slot((*shape[:-2], shape[-1]), real),
                "batch": Number(len(view.batch), fixed=True),
            }
        else:
            slots = moment_slots("exp_avg_sq", shape, real, group["state_dtype"], along)
        if group["beta1"] is not None:
            slots |= moment_slots("exp_avg", shape, dtype, group["state_dtype"], along)
        return slots

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
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
        options = {"weight": weight, "eps": eps, "clip_threshold": threshold}
        return operation(low, row, col, per_matrix=state["batch"] > 0, **options)

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """col <- col |O|² and A <- A O with the overlap O, or both gathered by column; row means stay.

        A column without a predecessor takes the mean of the others: a factor of zero would make the next
        direction infinite.
        """
        col, by_column = state["exp_avg_sq_col"], overlap.dtype == torch.int64
        if by_column:
            moved = col.gather(-1, overlap.clamp_min(0))
            col.copy_(torch.where(overlap < 0, col.mean(-1, keepdim=True), moved))
        else:
            col.copy_((col.unsqueeze(-2) @ overlap.abs().square().to(col.dtype)).squeeze(-2))
        if group["beta1"] is not None:
            mean = load_moment(state, "exp_avg", col.dtype)
            if by_column:
                pick(move_columns_, group["backend"], mean.device)(mean, overlap)
            else:
                mean = mean @ overlap.to(mean.dtype)
            store_moment_(state, "exp_avg", mean)
