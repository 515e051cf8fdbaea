"""Adam's rules: from a (low-rank) gradient to a direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.adam_update import adam_update_
from lowrank_optim.ops.fused_adam import fused_adam_, fused_adam_fits
from lowrank_optim.ops.move_columns import move_columns_
from lowrank_optim.ops.rounding import Positions
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import number
from lowrank_optim.optim.parts import Group, Option, Rule, Scalar, Slots, State, View
from lowrank_optim.optim.state_storage import (
    AXIS,
    SLICE,
    is_int4,
    load_moment,
    moment_slots,
    position,
    rounding_key,
    slices,
    store_moment_,
)
from lowrank_optim.optim.validation import check_range

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
# Of gradients that no kernel takes unless it is asked for.
WIDE = (torch.float64, torch.complex64, torch.complex128)
# Where moments are stored in 8 bits.
CODES = "exp_avg.codes"


def check_betas(name: str, betas: Any) -> None:
    """Raise ValueError unless ``betas`` are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid {name}: {betas!r}, expected two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        check_range(f"{name}[{i}]", beta, low=0.0, high=1.0, high_open=True)


class Adam(Rule):
    """Adam's moments and direction, as GaLore's code has it (Kingma, Ba 2015, arXiv 1412.6980, algorithm 1).

    M / (sqrt(V) + eps), with the bias correction sqrt(1 - beta2^t) / (1 - beta1^t) kept apart: eps is therefore added
    to the uncorrected sqrt(V). Moments are fp32 whatever the parameter's dtype (fp64 for fp64), because in bfloat16,
    rounded to nearest, a second moment with beta2 = 0.999 never decays; the group's ``state_dtype`` stores them in
    fewer bits.
    """

    elementwise = True
    masks = True
    rowwise = True
    # The option that holds the decays of the two moments.
    betas: ClassVar[str] = "betas"
    options = {"betas": Option(check_betas), "eps": Option(number())}

    def slots(self, shape: tuple[int, ...], view: View, group: Group, along: str | None) -> Slots:
        dtype, stored = view.wide, group["state_dtype"]
        if len(shape) > len(view.shape):
            # The full-rank rule sees complex parameters as pairs of real numbers.
            dtype = dtype.to_real()
        return {
            **moment_slots("exp_avg", shape, dtype, stored, along),
            **moment_slots("exp_avg_sq", shape, dtype.to_real(), stored, along),
        }

    def direction(
        self, low: Tensor, state: State, group: Group, norms: Tensor | None = None, *, ok: bool | Tensor = True,
        dtype: torch.dtype | None = None, spent: bool = False,
    ) -> Tensor:  # fmt: skip
        """M / (sqrt(V) + eps) in ``dtype``, by default fp32 or wider; of zeros where the gradient is not ``ok``."""
        kernel = self._kernel(adam8bit_direction if CODES in state else adam_direction, low, state, group)
        if kernel is not None:
            return self._by_kernel(kernel, low, state, group, norms, ok, dtype)
        low = zero_unless(ok, low)
        whole = CODES not in state and not is_int4(state, "exp_avg")
        if norms is not None or whole or low.numel() <= SLICE:
            return self._direction(low, state, group, norms, spent=spent)
        direction = torch.empty(low.shape, dtype=torch.promote_types(low.dtype, torch.float32), device=low.device)
        for part, (some, out) in slices(state, low.contiguous(), direction):
            out.copy_(self._direction(some, part, group))
        return direction

    def add_direction_(self, target: Tensor, grad: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """target += alpha * direction(grad), without a temporary where torch has one kernel for all of it."""
        eps = self._eps(state, group)
        if self._kernel(adam_direction, grad, state, group) is None and self._may_fuse(group, eps):
            moments = [load_moment(state, key, grad.dtype) for key in MOMENT_KEYS]
            if fused_adam_fits(target, grad, *moments):
                beta1, beta2 = group[self.betas]
                fused_adam_(target, grad, *moments, beta1=beta1, beta2=beta2, eps=float(eps), alpha=float(alpha))
                self._store_(moments, state)
                return
        super().add_direction_(target, grad, state, group, alpha=alpha)

    def update_(self, weight: Tensor, grad: Tensor, state: State, group: Group, *, size: Scalar, decay: Scalar) -> bool:
        """One kernel for contiguous weights of at most 32 bits."""
        kernel = self._kernel(adam_update_, weight, state, group)
        if kernel is None or not weight.is_contiguous() or weight.dtype == torch.float64:
            return False
        beta1, beta2 = group[self.betas]
        rounding = group["weight_rounding"] if weight.dtype == torch.bfloat16 else "nearest"
        names = [f"{key}.{part}" for part in ("codes", "scale") for key in MOMENT_KEYS]
        stored = [state[name] for name in (names if names[0] in state else MOMENT_KEYS)]
        kernel(
            weight, grad, *stored, beta1=beta1, beta2=beta2, eps=self._eps(state, group), alpha=size, decay=decay,
            keys=self._keys(state), key=None if rounding == "nearest" else rounding_key(state, "weight"),
            correction=state["weight_correction"] if rounding == "compensated" else None,
            start=position(state, weight),
        )  # fmt: skip
        return True

    def _direction(
        self, low: Tensor, state: State, group: Group, norms: Tensor | None = None, *, spent: bool = False
    ) -> Tensor:
        beta1, beta2 = group[self.betas]
        eps = self._eps(state, group)
        moments = [load_moment(state, key, low.dtype) for key in MOMENT_KEYS]
        if self._may_fuse(group, eps) and fused_adam_fits(low, *moments):
            direction = low if spent else torch.zeros_like(low)
            fused_adam_(direction, low, *moments, beta1=beta1, beta2=beta2, eps=float(eps), replace=True)
            if norms is not None:
                for out, some in zip(norms, (low, direction)):
                    torch.linalg.vector_norm(some, dim=-1, out=out)
        else:
            direction = adam_direction(low, *moments, beta1=beta1, beta2=beta2, eps=eps, norms=norms)
        self._store_(moments, state)
        return direction

    def _by_kernel(
        self, kernel: Callable[..., Tensor], low: Tensor, state: State, group: Group, norms: Tensor | None,
        ok: bool | Tensor, dtype: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        """Kernels read moments as they are stored, and the verdict."""
        beta1, beta2 = group[self.betas]
        eps, told = self._eps(state, group), None if isinstance(ok, bool) else ok
        if CODES in state:
            stored = [state[f"{key}.{part}"] for key in MOMENT_KEYS for part in ("codes", "scale")]
            return kernel(low, *stored, beta1=beta1, beta2=beta2, eps=eps, norms=norms, ok=told, dtype=dtype)
        return kernel(
            low, state["exp_avg"], state["exp_avg_sq"], beta1=beta1, beta2=beta2, eps=eps, keys=self._keys(state),
            start=position(state, low), norms=norms, ok=told, dtype=dtype,
        )  # fmt: skip

    def _keys(self, state: State) -> tuple[int | Tensor, int | Tensor] | None:
        if "exp_avg" not in state or state["exp_avg"].dtype != torch.bfloat16:
            return None
        return rounding_key(state, "exp_avg"), rounding_key(state, "exp_avg_sq")

    def _store_(self, moments: list[Tensor], state: State) -> None:
        for key, moment in zip(MOMENT_KEYS, moments):
            store_moment_(state, key, moment)

    def _kernel(
        self, operation: Callable[..., Any], like: Tensor, state: State, group: Group
    ) -> Callable[..., Any] | None:
        """That of an operation, where there is one for such moments."""
        backend = group["backend"]
        if group["state_dtype"] == "int4" or (backend is None and like.dtype in WIDE):
            return None
        kernel = pick(operation, backend, like.device)
        if kernel is operation:
            return None
        # They count elements through, whatever of other processes stands between two of them.
        return None if AXIS in state and isinstance(position(state, like), Positions) else kernel

    def _may_fuse(self, group: Group, eps: Scalar) -> bool:
        return group["backend"] is None and not isinstance(eps, Tensor)

    def _eps(self, state: State, group: Group) -> Scalar:
        eps: float = group["eps"]
        return eps

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        """sqrt(1 - beta2^t) / (1 - beta1^t)."""
        beta1, beta2 = group[self.betas]
        factor: Scalar = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return factor

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """M <- M O, V <- V |O|² with the overlap O, or both gathered by column.

        V is moved as if the coordinates of the gradient were independent; LDAdam's rule is finer.
        """
        for key in MOMENT_KEYS:
            moment = load_moment(state, key, torch.float32)
            if overlap.dtype == torch.int64:
                pick(move_columns_, group["backend"], moment.device)(moment, overlap)
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

    def _eps(self, state: State, group: Group) -> Scalar:
        eps: Scalar = group["eps"] * (1 - group[self.betas][1] ** state["step"]) ** 0.5
        return eps
