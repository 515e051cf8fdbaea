"""Rules shared by the methods: from a (low-rank) gradient to a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.optim.base import Group, State, check_range


class Adam:
    """Adam's moments and direction, as GaLore's code has it (Kingma, Ba 2015, arXiv 1412.6980, algorithm 1).

    M / (sqrt(V) + eps) with the bias correction sqrt(1 - beta2^t) / (1 - beta1^t) kept apart: eps therefore
    stands beside the uncorrected sqrt(V). Moments are fp32 whatever the parameter's dtype (fp64 for fp64), because
    in bfloat16 a second moment with beta2 = 0.999 never decays.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on betas outside [0, 1) or a negative eps."""
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas!r}, expected two numbers in [0, 1)")
        for i, beta in enumerate(betas):
            check_range(f"betas[{i}]", beta, low=0.0, high=1.0, high_open=True)
        check_range("eps", group["eps"], low=0.0)

    def init(self, like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
        """Zero moments of ``shape``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        state["exp_avg"] = torch.zeros(shape, dtype=dtype, device=like.device)
        state["exp_avg_sq"] = torch.zeros(shape, dtype=dtype.to_real(), device=like.device)

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """M / (sqrt(V) + eps), the moments being updated in place."""
        beta1, beta2 = group["betas"]
        operation = pick(adam_direction, group["backend"], low.device)
        return operation(low, state["exp_avg"], state["exp_avg_sq"], beta1=beta1, beta2=beta2, eps=group["eps"])

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
        """sqrt(1 - beta2^t) / (1 - beta1^t)."""
        beta1, beta2 = group["betas"]
        factor: float | Tensor = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return factor

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """M <- M O, V <- V |O|² with the overlap O, or both gathered by column.

        V is moved as if the coordinates of the gradient were independent; LDAdam's rule is finer.
        """
        if overlap.dtype == torch.int64:
            gone = overlap < 0
            for key in ("exp_avg", "exp_avg_sq"):
                moved = state[key].index_select(-1, overlap.clamp_min(0))
                state[key].copy_(moved.masked_fill_(gone, 0))
            return
        overlap = overlap.to(state["exp_avg"].dtype)
        state["exp_avg"].copy_(state["exp_avg"] @ overlap)
        state["exp_avg_sq"].copy_(state["exp_avg_sq"] @ overlap.abs().square())


class CorrectedAdam(Adam):
    """Adam with eps beside the bias-corrected sqrt(V), as in ``torch.optim.AdamW``.

    M / (sqrt(V) + eps sqrt(1 - beta2^t)), which with the correction of :class:`Adam` is M̂ / (sqrt(V̂) + eps).
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError as :class:`Adam` does, and where a kernel was asked for that cannot be captured."""
        super().validate(group)
        if group["capturable"] and group["backend"] == "triton":
            raise ValueError("Invalid backend: 'triton' with capturable=True, expected None or 'eager' (eps is a tensor)")

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """M / (sqrt(V) + eps sqrt(1 - beta2^t)), the moments being updated in place."""
        eps = group["eps"] * (1 - group["betas"][1] ** state["step"]) ** 0.5
        # The kernel takes eps as a number.
        backend = "eager" if isinstance(eps, Tensor) else group["backend"]
        return super().direction(low, state, {**group, "eps": eps, "backend": backend})
