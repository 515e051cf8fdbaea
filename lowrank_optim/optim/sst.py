"""SST: Adam on all singular values and on a changing sample of the singular vectors."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lowrank_optim.ops.triplets import Triplets, activate_, compose, decompose_, draw_slots, normalize_columns_
from lowrank_optim.optim.layers import LayerOptimizer, layer_groups
from lowrank_optim.optim.lifts.plain import Unscaled
from lowrank_optim.optim.options import Common, arguments, natural, optional, optional_positive_int
from lowrank_optim.optim.parts import Group, Option, Parts, Scalar, State
from lowrank_optim.optim.rules.adam import MOMENT_KEYS, Adam
from lowrank_optim.optim.state_storage import load_moment, store_moment_
from lowrank_optim.optim.weight_storage import writable


def spectral_groups(model: nn.Module | Iterable[tuple[str, Tensor]], **options: Any) -> list[dict[str, Any]]:
    """Split a model's parameters into one group a layer of :class:`lowrank_optim.nn.SST` and one of the rest.

    Args:
        model: a converted module, or its named parameters, those without gradient included.
        options: hyper-parameters of the layers' groups; what is absent takes the optimizer's value, except
            ``weight_decay``, which is 0: lengths are normalised away, and singular values are not decayed.

    Returns:
        For each layer a group whose ``params`` are u, s, v, u_frozen, v_frozen and whose ``rank`` is the number of
        columns of u; then, unless it is empty, a group of all other trainable parameters with ``rank: None``.

    Raises:
        ValueError: a model without such layers.
    """
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    layers = _layers(named)
    if not layers:
        raise ValueError("Invalid model: it holds no SST layer; lowrank_optim.nn.convert(model, SST(rank=...)) first")
    ranks = {tuple(f"{prefix}{field}" for field in Triplets._fields): p.u.shape[1] for prefix, p in layers.items()}
    return layer_groups(dict(named), ranks, {"weight_decay": 0.0, **options})


def _layers(named: list[tuple[str, Tensor]]) -> dict[str, Triplets]:
    """The layers among named parameters, by prefix: those with all five parts."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in named:
        dot = name.rfind(".") + 1
        if name[dot:] in Triplets._fields:
            found.setdefault(name[:dot], {})[name[dot:]] = p
    return {prefix: Triplets(**parts) for prefix, parts in found.items() if len(parts) == len(Triplets._fields)}


class RampedAdam(Adam):
    """Adam whose step size rises from 0.1 % to all of it over the updates after a layer's moments were zeroed."""

    # Vectors are normalised after their update, which takes all of them.
    elementwise = False

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        """The bias correction, times 0.001 + 0.999 (t - 1) / (warmup - 1) in the first updates of a layer's part."""
        factor = super().correction(step, group)
        warmup = group["update_proj_gap"] // 10 if group["warmup"] is None else group["warmup"]
        if group["rank"] is None or step >= warmup:
            return factor
        return factor * (0.001 + 0.999 * (step - 1) / (warmup - 1))


class SSTAdamW(LayerOptimizer):
    """AdamW for models with layers of :class:`lowrank_optim.nn.SST`, W = Σ_i s_i u_i v_iᵀ over q triplets.

    With a sample I of r triplets for ``update_proj_gap`` updates:

        U_I, V_I, S = U_I, V_I, S - lr ramp(t) Adam(dU_I), ...     t counts from when the moments were zero
        S = max(S, 0);  u_i, v_i = u_i / |u_i|, v_i / |v_i|        i in I
        after update_proj_gap updates:                   I ~ (1/q + S / Σ S) / 2, without replacement;
                                                         moments of U_I, V_I = 0
        before that, after samples_per_round samples:    U, S, V = svd(U diag(S) Vᵀ);  moments of S = 0

    Parameters outside of such layers follow AdamW by the full-rank rule of the other optimizers here. A sample
    or a decomposition leaves every W as it is; between two decompositions the vectors are not orthogonal.

    Args:
        params: :func:`spectral_groups` of the model, or ``model.named_parameters()``. Tensors without names are
            ordinary parameters.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt of the second moment, >= 0.
        weight_decay: decoupled, >= 0; of ordinary parameters, see :func:`spectral_groups`.
        update_proj_gap: updates for which a sample trains, >= 1.
        samples_per_round: samples between two decompositions, >= 1; None is ceil(q / r).
        warmup: updates of the ramp, >= 0; None is a tenth of update_proj_gap.
        seed: of the draws; each depends on this, on the layer's position and on how many it drew before.
        common: state_dtype, weight_rounding, maximize and backend of :class:`lowrank_optim.optim.options.Common`;
            stagger and capturable must be False.

    Raises:
        ValueError: an argument out of range, no parameters, or a group with a rank that is no layer.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2405.15481).

    Deviations: the authors' code was not available. The ramp applies to the parts whose moments were zeroed, where the
    paper lowers the rate of the whole model at every sample; the moments of S live for a round. In data-parallel
    training every process draws and decomposes for itself, which agrees where the processes run the same software on
    the same kind of device.
    """

    triple = Parts(None, RampedAdam(), Unscaled())
    full_rank = RampedAdam()
    layer, maker = "SST layer", "spectral_groups"
    options = {
        **LayerOptimizer.options,
        "samples_per_round": Option(optional_positive_int, None),
        "warmup": Option(optional(natural), None),
        "seed": Option(natural, 0),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        samples_per_round: int | None = None,
        warmup: int | None = None,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(params, (Tensor, dict, str)):
            params = list(params)
            if params and isinstance(params[0], tuple) and _layers(params):
                params = spectral_groups(params)
        super().__init__(params, {"rank": None, **arguments(locals())})

    def is_layer(self, params: list[Tensor], rank: int) -> bool:
        """Whether parameters are the five parts of a layer that samples ``rank`` triplets."""
        if len(params) != len(Triplets._fields) or any(p.ndim != (1 if i == 1 else 2) for i, p in enumerate(params)):
            return False
        parts = Triplets(*params)
        m, n, q = parts.u.shape[0], parts.v.shape[0], parts.s.numel()
        shapes = [tuple(p.shape) for p in parts]
        return shapes == [(m, rank), (q,), (n, rank), (m, q - rank), (n, q - rank)]

    def _explain(self, param: Tensor, group: Group) -> tuple[str, str]:
        rank = group["rank"]
        if rank is None:
            return super()._explain(param, group)
        number = self.entry(param).number
        if number == 1:
            return "full-rank", "singular values"
        if number < 3:
            return f"rank {rank}", f"a sample of {rank} pairs of vectors"
        return "frozen", "outside of the sample"

    def finish_(self, target: Tensor, group: Group) -> None:
        """S is clamped and vectors are normalised, before either is rounded."""
        if group["rank"] is None:
            return
        if target.ndim == 1:
            target.clamp_(min=0)
        else:
            normalize_columns_(target)

    def update_param(
        self, param: Tensor, grad: Tensor, group: Group, key: tuple[Any, ...] | None, ok: bool | Tensor | None = None
    ) -> None:
        """Update one parameter; the last one of a layer to be updated also draws the layer's next sample."""
        super().update_param(param, grad, group, key, ok)
        if group["rank"] is None:
            return
        self.state[param]["updates"] += 1
        draw, rest = divmod(self.state[param]["updates"], group["update_proj_gap"])
        counts = {self.state.get(p, {}).get("updates") for p in group["params"] if p.requires_grad}
        if rest == 0 and len(counts) == 1:
            start = time.perf_counter()
            self._draw(draw, group)
            self.refresh_seconds += time.perf_counter() - start

    def _draw(self, draw: int, group: Group) -> None:
        """Swap the sample number ``draw`` of a layer in, at the end of a round after a decomposition."""
        states: list[State] = [self.state.get(p, {}) for p in group["params"]]
        u, s, v = states[:3]
        position = next(state["seed"] for state in states if state)
        mixed = np.random.SeedSequence([group["seed"], position, draw]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device="cpu").manual_seed(int(mixed >> np.uint64(1)))
        with ExitStack() as stack:
            parts = Triplets(
                *(
                    stack.enter_context(writable(p, state, group["weight_rounding"])) if state else p
                    for p, state in zip(group["params"], states)
                )
            )
            if draw % (group["samples_per_round"] or -(-parts.s.numel() // group["rank"])) == 0:
                if decompose_(parts, compose(parts)):
                    _zero_moments_(s)
                else:
                    self._warn_once("kept singular vectors because a weight has no singular value decomposition")
            slots = draw_slots(parts.s, group["rank"], generator)
            if slots is None:
                self._warn_once("kept a sample because singular values are not finite")
                return
            moments = {key: load_moment(s, key, parts.s.dtype) for key in MOMENT_KEYS if s}
            activate_(parts, slots, *moments.values())
            for key, moment in moments.items():
                store_moment_(s, key, moment)
            _zero_moments_(u)
            _zero_moments_(v)


def _zero_moments_(state: State) -> None:
    for key, value in state.items():
        if key.startswith(MOMENT_KEYS):
            value.zero_()
    if state:
        state["step"] = 0
