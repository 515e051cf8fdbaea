"""Rules shared by the methods: from a (low-rank) gradient to a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.fused_adam import fused_adam_, fused_adam_fits
from lowrank_optim.ops.move_columns import move_columns_
from lowrank_optim.optim.checks import check_range
from lowrank_optim.optim.moments import SLICE, init_moment, load_moment, rounding_key, slices, store_moment_
from lowrank_optim.optim.protocols import IDENTITY, Group, State

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


class Adam:
    """Adam's moments and direction, as GaLore's code has it (Kingma, Ba 2015, arXiv 1412.6980, algorithm 1).

    M / (sqrt(V) + eps) with the bias correction sqrt(1 - beta2^t) / (1 - beta1^t) kept apart: eps therefore
    stands beside the uncorrected sqrt(V). Moments are fp32 whatever the parameter's dtype (fp64 for fp64), because
    in bfloat16, rounded to nearest, a second moment with beta2 = 0.999 never decays; the group's ``state_dtype``
    stores them in fewer bits.
    """

    elementwise = True

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
        init_moment(state, "exp_avg", shape, dtype, like.device, group["state_dtype"])
        init_moment(state, "exp_avg_sq", shape, dtype.to_real(), like.device, group["state_dtype"])

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """M / (sqrt(V) + eps), the moments being updated in place."""
        if "exp_avg.codes" not in state or low.numel() <= SLICE or self._has_kernels(low, group):
            return self._direction(low, state, group)
        direction = torch.empty(low.shape, dtype=torch.promote_types(low.dtype, torch.float32), device=low.device)
        for part, (some, out) in slices(state, low.contiguous(), direction):
            out.copy_(self._direction(some, part, group))
        return direction

    def measured_direction(self, low: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """The direction, and the norms of the rows of ``low`` and of it, (rows, 1) each, by kernels only."""
        norms = torch.empty(2, low.shape[0], dtype=torch.float32, device=low.device)
        direction = self._direction(low, state, group, norms)
        return direction, norms[0].unsqueeze(1), norms[1].unsqueeze(1)

    def update_(self, target: Tensor, grad: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha * direction(grad), without a temporary where torch has one kernel for all of it."""
        if self._has_kernels(grad, group):
            direction = self._direction(grad, state, group)
        else:
            moments = [load_moment(state, key, grad.dtype) for key in MOMENT_KEYS]
            eps = self._eps(state, group)
            if self._fuses(group, eps, target, grad, *moments):
                beta1, beta2 = group["betas"]
                fused_adam_(target, grad, *moments, beta1=beta1, beta2=beta2, eps=float(eps), alpha=float(alpha))
                self._store_(moments, state)
                return
            direction = self._direction_of(grad, moments, state, group)
        IDENTITY.add_up_(target, direction, state, group, alpha=alpha)

    def _direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
        if not self._has_kernels(low, group):
            return self._direction_of(low, [load_moment(state, key, low.dtype) for key in MOMENT_KEYS], state, group)
        beta1, beta2 = group["betas"]
        eps = self._eps(state, group)
        # Kernels read moments as they are stored.
        first, second = MOMENT_KEYS
        if f"{first}.codes" in state:
            stored = [state[f"{key}.{part}"] for key in MOMENT_KEYS for part in ("codes", "scale")]
            by_blocks = pick(adam8bit_direction, group["backend"], low.device)
            return by_blocks(low, *stored, beta1=beta1, beta2=beta2, eps=eps, norms=norms)
        rounded = state[first].dtype == torch.bfloat16
        return pick(adam_direction, group["backend"], low.device)(
            low, state[first], state[second], beta1=beta1, beta2=beta2, eps=eps,
            keys=(rounding_key(state, first), rounding_key(state, second)) if rounded else None,
            start=state.get("start", 0), norms=norms,
        )  # fmt: skip

    def _direction_of(self, low: Tensor, moments: list[Tensor], state: State, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        eps = self._eps(state, group)
        if self._fuses(group, eps, low, *moments):
            direction = torch.zeros_like(moments[0])
            fused_adam_(direction, low, *moments, beta1=beta1, beta2=beta2, eps=float(eps), alpha=1.0)
        else:
            direction = adam_direction(low, *moments, beta1=beta1, beta2=beta2, eps=eps)
        self._store_(moments, state)
        return direction

    def _store_(self, moments: list[Tensor], state: State) -> None:
        for key, moment in zip(MOMENT_KEYS, moments):
            store_moment_(state, key, moment)

    def _has_kernels(self, low: Tensor, group: Group) -> bool:
        if group["backend"] is None and (low.dtype == torch.float64 or low.is_complex()):
            return False
        return pick(adam_direction, group["backend"], low.device) is not adam_direction

    def _fuses(self, group: Group, eps: float | Tensor, *tensors: Tensor) -> bool:
        return group["backend"] is None and not isinstance(eps, Tensor) and fused_adam_fits(*tensors)

    def _eps(self, state: State, group: Group) -> float | Tensor:
        eps: float = group["eps"]
        return eps

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
        """sqrt(1 - beta2^t) / (1 - beta1^t)."""
        beta1, beta2 = group["betas"]
        factor: float | Tensor = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return factor

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """M <- M O, V <- V |O|² with the overlap O, or both gathered by column.

        V is moved as if the coordinates of the gradient were independent; LDAdam's rule is finer.
        """
        for key in MOMENT_KEYS:
            moment = load_moment(state, key, torch.float32)
            if overlap.dtype == torch.int64:
                pick(move_columns_, group.get("backend"), moment.device)(moment, overlap)
                moved = moment
            elif key == "exp_avg":
                moved = moment @ overlap.to(moment.dtype)
            else:
                moved = moment @ overlap.abs().square().to(moment.dtype)
            store_moment_(state, key, moved)


class CorrectedAdam(Adam):
    """Adam with eps beside the bias-corrected sqrt(V), as in ``torch.optim.AdamW``.

    M / (sqrt(V) + eps sqrt(1 - beta2^t)), which with the correction of :class:`Adam` is M̂ / (sqrt(V̂) + eps).
    """

    def _eps(self, state: State, group: Group) -> float | Tensor:
        eps: float | Tensor = group["eps"] * (1 - group["betas"][1] ** state["step"]) ** 0.5
        return eps
