"""Restarts: callbacks that act every so many updates on a converted model and on its optimizer.

Call ``after_step(step)`` after the optimizer and the schedule, with the number of updates done (not of
micro-batches). What a callback remembers is in its ``state_dict()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lowrank_optim.nn.base import FactoredLinear, working_dtype
from lowrank_optim.nn.convert import factored_layers, layer_generator, layer_positions
from lowrank_optim.nn.lowrank import ReLoRALinear
from lowrank_optim.ops.factors import balance_factors
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.validation import check_choice, check_positive_int, check_range

SCOPES = ("all", "factors")
PRUNING = ("random", "magnitude")

# State keys of a first and of a second moment in torch.optim, here, and in bitsandbytes. A key also stands for its
# parts ("exp_avg.codes"). Codes of 8-bit moments mean zero where their scales are zero.
FIRST = ("exp_avg", "momentum", "momentum_buffer", "state1", "absmax1")
SECOND = (
    *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "row_var", "col_var", "variance"),
    *("state2", "absmax2", "exp_avg_sq_row", "exp_avg_sq_col", "row_scale", "column_scale"),
)
# Factor of the learning rate at the first update after a restart.
RAMP_START = 0.001


class Restart(ABC):
    """What every restart shares: when it happens, and the learning-rate ramp after it.

    The ramp multiplies the learning rate of the ``ramp`` updates after a restart by 0.001, ..., 1, evenly spaced.
    It acts inside ``optimizer.step()`` only, so that every schedule keeps its own values; where updates do not go
    through ``step()``, as with :func:`lowrank_optim.step_in_backward`, put them inside of :meth:`ramped`.

    Args:
        optimizer: whose learning rates are ramped; None for a restart without a ramp.
        every: updates from one restart to the next.
        first: no restart before this many updates; the end of the warm-up is a good value.
        ramp: length of the ramp in updates, 0 for none.

    Raises:
        ValueError: an option out of range, among them a ramp that is longer than ``every``.
    """

    def __init__(self, optimizer: Optimizer | None, *, every: int, first: int, ramp: int) -> None:
        check_positive_int("every", every)
        check_range("first", first, low=0)
        check_range("ramp", ramp, low=0, high=every)
        self.every, self.first, self.ramp = every, first, ramp
        self.step = self.restarts = 0
        self.restarted_at: int | None = None
        self.optimizer = optimizer
        self._learning_rates: list[tuple[dict[str, Any], Any]] = []
        if optimizer is not None and ramp > 1:
            optimizer.register_step_pre_hook(self._lower)
            optimizer.register_step_post_hook(self._restore)

    @abstractmethod
    def restart_(self) -> None:
        """Act on model or optimizer, in place."""

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Restart where it is due after ``step`` updates; returns whether it was."""
        self.step = step
        due = step > 0 and step % self.every == 0 and step >= self.first
        if due:
            self.restart_()
            self.restarts += 1
            self.restarted_at = step
        return due

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate at the coming update."""
        if self.restarted_at is None or self.ramp < 2:
            return 1.0
        done = min(self.step - self.restarted_at, self.ramp - 1)
        return RAMP_START + (1 - RAMP_START) * done / (self.ramp - 1)

    @contextmanager
    def ramped(self) -> Iterator[None]:
        """Within it the learning rates are those of the coming update, for updates outside of ``optimizer.step()``."""
        if self.optimizer is not None:
            self._lower(self.optimizer)
        try:
            yield
        finally:
            self._restore()

    def state_dict(self) -> dict[str, int | None]:
        """Counters only."""
        return {"step": self.step, "restarts": self.restarts, "restarted_at": self.restarted_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.step, self.restarts, self.restarted_at = state["step"], state["restarts"], state["restarted_at"]

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        # An update that raised has not restored them.
        self._restore()
        factor = self.lr_factor
        if factor == 1.0:
            return
        for group in optimizer.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                # In place: a captured CUDA graph reads this tensor.
                self._learning_rates.append((group, lr.clone()))
                lr.mul_(factor)
            else:
                self._learning_rates.append((group, lr))
                group["lr"] = lr * factor

    def _restore(self, *_: Any) -> None:
        for group, lr in self._learning_rates:
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr
        self._learning_rates.clear()


class WeightRefactorization(Restart):
    """Every so many updates B <- U sqrt(S), A <- sqrt(S) Vᵀ of B A = U S Vᵀ (arXiv 2505.22922).

    The weight stays; only its split becomes even, which is where the Hessian is best conditioned. Moments of the
    factors belong to the old split: use it with :class:`MomentumReset`. Sparse values are left as they are.

    Args:
        model: a converted model.
        every: updates from one refactorization to the next (published: 200).
        first: no refactorization before this many updates.

    Raises:
        ValueError: an option out of range, a model without factors B A, or with an activation between them:
            an even split would change what such a layer computes.
    """

    def __init__(self, model: nn.Module, *, every: int = 200, first: int = 0) -> None:
        super().__init__(None, every=every, first=first, ramp=0)
        self.layers = _layers_with_factors(model)
        for name, layer in self.layers.items():
            if layer.nonlinear:
                raise ValueError(
                    f"Invalid model: {name!r} has an activation between its factors, which refactorization would "
                    "move; use MomentumReset alone"
                )

    def restart_(self) -> None:
        for layer in self.layers.values():
            old_b, old_a = factors(layer)
            dtype = working_dtype(old_b.dtype)
            b, a = balance_factors(old_b.to(dtype), old_a.to(dtype))
            old_b.copy_(b)
            old_a.copy_(a)
            if distributed.is_available() and distributed.is_initialized():
                # Singular vectors have arbitrary signs; every process must have the same.
                distributed.broadcast(old_b.data, 0)
                distributed.broadcast(old_a.data, 0)


class MomentumReset(Restart):
    """Every so many updates all moments and step counts start from zero (arXiv 2505.22922).

    The first update afterwards is the learning rate times the sign of the gradient, hence the ramp.

    Args:
        model: a converted model.
        optimizer: any whose state keys are known: torch.optim's Adam family, bitsandbytes' and those of this package.
        every: updates from one reset to the next (published: 200).
        first: no reset before this many updates.
        ramp: updates until the learning rate is back (published: 10).
        scope: "all" parameters, as published, or only the "factors" B and A.

    Raises:
        ValueError: an option out of range, or scope="factors" for a model without them.
    """

    optimizer: Optimizer

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, every: int = 200, first: int = 0, ramp: int = 10,
        scope: str = "all",
    ) -> None:  # fmt: skip
        super().__init__(optimizer, every=every, first=first, ramp=ramp)
        check_choice("scope", scope, SCOPES)
        if scope == "factors":
            layers = _layers_with_factors(model).values()
            self.parameters: list[Tensor] = [p for layer in layers for p in factors(layer)]
        else:
            self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def restart_(self) -> None:
        reset_moments_(self.optimizer, self.parameters)


class MergeAndRestart(Restart):
    """ReLoRA's restart: W0 += s B A, A drawn anew, B = 0, and their moments pruned (arXiv 2307.05695).

    Args:
        model: a model converted with :class:`lowrank_optim.nn.ReLoRA`.
        optimizer: see :class:`MomentumReset`.
        every: updates from one restart to the next (published: 500 to 5000).
        first: no restart before this many updates.
        ramp: updates until the learning rate is back (published: 100).
        prune: share of the factors' moments that is set to zero. 1, the default, zeroes them and the step count; a
            smaller share (published: 0.999 at random, 0.8 to 0.9 by magnitude) keeps the count and needs moments in
            floating point.
        by: "random" or "magnitude" (of the first moment; the smallest go).
        seed: of the new A and of the random pruning; neither reads torch's generators.

    Raises:
        ValueError: an option out of range, or a model without ReLoRA layers.

    Deviations: both moments of an entry are pruned together. Pruned apart, as published, an entry that loses only
    its second moment makes an update of size 1/eps.
    """

    optimizer: Optimizer

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, every: int = 1000, first: int = 0, ramp: int = 100,
        prune: float = 1.0, by: str = "random", seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, every=every, first=first, ramp=ramp)
        check_range("prune", prune, low=0.0, high=1.0)
        check_choice("by", by, PRUNING)
        positions = layer_positions(model)
        layers = [m for m in factored_layers(model).values() if isinstance(m, ReLoRALinear)]
        if not layers:
            raise ValueError(f"Invalid model: {type(model).__name__} holds no ReLoRALinear to restart")
        self.layers = {positions[layer]: layer for layer in layers}
        self.prune, self.by, self.seed = prune, by, seed

    def restart_(self) -> None:
        for position, layer in self.layers.items():
            generator = layer_generator(self.seed, position, self.restarts + 1)
            layer.merge_and_restart_(generator)
            if self.prune == 1:
                reset_moments_(self.optimizer, factors(layer))
                continue
            for parameter in factors(layer):
                _prune_moments_(self.optimizer.state.get(parameter, {}), self.prune, self.by, generator)


def factors(layer: FactoredLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """B (m, r) and A (r, n) of a layer that has them."""
    b, a = layer.B, layer.A
    if not (isinstance(b, nn.Parameter) and isinstance(a, nn.Parameter)):
        raise TypeError(f"{type(layer).__name__} holds no factors B and A")
    return b, a


@torch.no_grad()
def reset_moments_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Set moments and step counts to zero, in place; parameters without state have nothing to reset.

    Raises:
        ValueError: a state of another package's optimizer in which no moment is known.
    """
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:
            continue
        keys = [key for key in state if key == "step" or _moment(key)]
        if not any(_moment(key) for key in keys) and not isinstance(optimizer, LowRankOptimizer):
            raise ValueError(
                f"Invalid optimizer: {type(optimizer).__name__} keeps {', '.join(map(str, state))}, and none of these "
                "is known to be a moment"
            )
        for key in keys:
            if isinstance(state[key], Tensor):
                state[key].zero_()
            elif state[key] is not None:
                state[key] = 0


def _moment(key: str) -> bool:
    name, _, part = str(key).partition(".")
    # A product of two factors is zero where the left one is; if both were, neither would ever move again.
    return name in (*FIRST, *SECOND) and part != "right"


def _prune_moments_(state: dict[str, Any], share: float, by: str, generator: torch.Generator) -> None:
    moments = [value for key, value in state.items() if _moment(key) and isinstance(value, Tensor)]
    if not moments:
        return
    first = state.get("exp_avg", state.get("momentum"))
    if first is None or not all(m.is_floating_point() and m.shape == first.shape for m in moments):
        raise ValueError(f"Invalid prune: {share}, expected 1 for moments of the kind {', '.join(state)}")
    if by == "random":
        scores = torch.rand(first.shape, generator=generator, dtype=torch.float32, device="cpu")
    else:
        scores = first.abs()
    # The smallest scores go, exactly their share.
    gone = scores.flatten().argsort()[: round(share * first.numel())].to(first.device)
    for moment in moments:
        moment.view(-1)[gone] = 0


def _layers_with_factors(model: nn.Module) -> dict[str, FactoredLinear]:
    layers = {name: m for name, m in factored_layers(model).items() if hasattr(m, "A") and hasattr(m, "B")}
    if not layers:
        raise ValueError(f"Invalid model: {type(model).__name__} holds no layer with factors B and A")
    return layers
