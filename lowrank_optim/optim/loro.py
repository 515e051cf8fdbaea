"""LORO: Adam on the factors of W = B A, and now and then a step along the manifold of rank-r matrices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from lowrank_optim.ops.factors import retracted_step
from lowrank_optim.optim.layers import LayerOptimizer, layer_groups
from lowrank_optim.optim.lifts.plain import Unscaled
from lowrank_optim.optim.options import Common, arguments, number, optional
from lowrank_optim.optim.parts import Group, Option, Parts, Scalar
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.weight_storage import writable


def factor_groups(model: nn.Module | Iterable[tuple[str, Tensor]], **options: Any) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into one group a layer with factors, and one of the rest.

    Args:
        model: a converted module, or its named parameters.
        options: hyper-parameters of the layers' groups; what is absent takes the optimizer's value.

    Returns:
        For each layer a group whose ``params`` are B (m, r) and A (r, n) and whose ``rank`` is r; then, unless it is
        empty, a group of all other trainable parameters with ``rank: None``.

    Raises:
        ValueError: a model without factors, or with an activation between them.
    """
    if isinstance(model, nn.Module):
        for name, layer in model.named_modules():
            # Layers of lowrank_optim.nn say so; nothing else has an activation between two parameters.
            if getattr(layer, "nonlinear", False):
                raise ValueError(f"Invalid model: {name!r} has an activation between its factors, so it has no W = B A")
        model = model.named_parameters()
    named = {name: p for name, p in model if p.requires_grad}
    layers = _layers(named)
    if not layers:
        raise ValueError("Invalid model: it holds no factors B and A; lowrank_optim.nn.convert(model, LORO()) first")
    ranks: dict[tuple[str, ...], int] = {
        (f"{prefix}B", f"{prefix}A"): named[f"{prefix}A"].shape[0] for prefix in layers
    }
    return layer_groups(named, ranks, options)


def _layers(named: dict[str, Tensor]) -> list[str]:
    """The prefixes under which both factors stand."""
    prefixes = [name[:-1] for name in named if name.rpartition(".")[2] == "A"]
    return [prefix for prefix in prefixes if f"{prefix}B" in named and _pair(named[f"{prefix}B"], named[f"{prefix}A"])]


def _pair(b: Tensor, a: Tensor) -> bool:
    return b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0]


class FactorAdam(Adam):
    """Adam whose step on a factor is scaled by r / min(m, n), or by the group's ``scale``."""

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        """The bias correction, times the scale of factors."""
        factor = super().correction(step, group)
        if group["rank"] is None:
            return factor
        return factor * factor_scale(group)


def factor_scale(group: Group) -> float:
    """The group's ``scale``, or r / min(m, n) where that is None."""
    if group["scale"] is not None:
        return float(group["scale"])
    b, a = group["params"]
    return float(group["rank"] / min(b.shape[0], a.shape[1]))


class LOROAdamW(LayerOptimizer):
    """AdamW for the factors of W = B A, with a step on the manifold of rank-r matrices every so many updates.

    With D_B and D_A, the bias-corrected directions of Adam for the two factors:

        B, A = B - lr scale D_B, A - lr scale D_A                          most updates
        B A = truncate_r(B A - lr P(G)),  G Aᵀ = D_B,  Bᵀ G = D_A           every update_proj_gap updates;
                                                    split evenly, then moments and step counts of B and A = 0

    P projects on the tangent space at B A; see :func:`lowrank_optim.ops.factors.retracted_step`. Parameters without
    factors follow AdamW. The published runs also zero all other moments at the same updates and raise the learning
    rate over the next five: ``lowrank_optim.nn.MomentumReset(model, optimizer, every=update_proj_gap, ramp=5)``.

    Args:
        params: :func:`factor_groups` of the model, or ``model.named_parameters()``. Tensors without names are
            ordinary parameters.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt of the second moment, >= 0.
        weight_decay: decoupled, >= 0; of factors and ordinary parameters.
        update_proj_gap: updates from one step on the manifold to the next, >= 1.
        scale: of all other steps on factors, >= 0; None is r / min(m, n), the published r / hidden_size for LLaMA.
        common: state_dtype, weight_rounding, maximize and backend of :class:`lowrank_optim.optim.options.Common`;
            stagger and capturable must be False.

    Raises:
        ValueError: an argument out of range, no parameters, or a group with a rank that is no pair of factors.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Mo, Huang, Pan 2025 (arXiv 2502.00018).

    Deviations: the lower left block of the core is R_b' where the paper prints R_b, an error of the print. Where a
    factor has no full rank, the update is an ordinary one instead of an error. In data-parallel training every process
    decomposes for itself, which agrees where the processes run the same software on the same kind of device.
    """

    triple = Parts(None, FactorAdam(), Unscaled())
    full_rank = FactorAdam()
    layer, maker = "factors", "factor_groups"
    options = {**LayerOptimizer.options, "scale": Option(optional(number()), None)}
    # Gradients of first factors whose step on the manifold waits for the second one.
    _waiting: dict[Tensor, Tensor] | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 500,
        scale: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(params, (Tensor, dict, str)):
            params = list(params)
            if params and isinstance(params[0], tuple) and _layers(dict(params)):
                params = factor_groups(params)
        super().__init__(params, {"rank": None, **arguments(locals())})

    def is_layer(self, params: list[Tensor], rank: int) -> bool:
        """Whether parameters are B and A of this rank."""
        return len(params) == 2 and _pair(*params) and params[0].shape[1] == rank

    def _explain(self, param: Tensor, group: Group) -> tuple[str, str]:
        if group["rank"] is None:
            return super()._explain(param, group)
        return f"rank {group['rank']}", "a factor of W = B A"

    def update_param(
        self, param: Tensor, grad: Tensor, group: Group, key: tuple[Any, ...] | None, ok: bool | Tensor | None = None
    ) -> None:
        """Update one parameter; a step on the manifold is made when the second factor's turn comes."""
        if group["rank"] is None:
            super().update_param(param, grad, group, key, ok)
            return
        state = self._plan(param, group, key).state
        state["updates"] += 1
        self._waiting = {} if self._waiting is None else self._waiting
        # Left over where the other factor had no gradient.
        self._waiting.pop(param, None)
        if state["updates"] % group["update_proj_gap"]:
            super().update_param(param, grad, group, key, ok)
            return
        self._waiting[param] = grad
        counts = {self.state.get(p, {}).get("updates") for p in group["params"]}
        if counts != {state["updates"]} or not all(p in self._waiting for p in group["params"]):
            return
        grads = [self._waiting.pop(p) for p in group["params"]]
        start = time.perf_counter()
        if not all(grad.isfinite().all() for grad in grads):
            self._warn_once("skipped an update because of a non-finite gradient")
        elif not self._step_on_manifold_(grads, group):
            self._warn_once("made an ordinary step because a factor has no full rank")
        self.refresh_seconds += time.perf_counter() - start

    def _step_on_manifold_(self, grads: list[Tensor], group: Group) -> bool:
        """Move both factors together; False where one has no full rank and they moved apart as usual."""
        states = [self.state[p] for p in group["params"]]
        lr = -group["lr"] if group["maximize"] else group["lr"]
        directions = []
        for state, grad in zip(states, grads, strict=True):
            state["step"] += 1
            correction = Adam.correction(self.full_rank, state["step"], group)
            directions.append(self.full_rank.direction(grad, state, group) * correction)
        with ExitStack() as stack:
            weights = [
                stack.enter_context(writable(p, state, group["weight_rounding"]))
                for p, state in zip(group["params"], states, strict=True)
            ]
            b, a = (w.to(d.dtype) for w, d in zip(weights, directions, strict=True))
            moved = retracted_step(b, a, directions[0], directions[1], lr)
            step = lr * factor_scale(group)
            new = moved or (b - step * directions[0], a - step * directions[1])
            for weight, value in zip(weights, new, strict=True):
                weight.copy_(value)
                if group["weight_decay"] != 0:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
        if moved is None:
            return False
        for state in states:
            # Moments of the old split say nothing about the new one.
            for key, value in state.items():
                if key.startswith("exp_avg"):
                    value.zero_()
            state["step"] = 0
        return True
