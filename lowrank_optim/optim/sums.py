"""Micro-batches summed at low rank: R = Σ G_i P in place of Σ G_i, and what a refresh needs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import mix_key, round_to_bfloat16
from lowrank_optim.optim.base import LowRankOptimizer, refresh_due
from lowrank_optim.optim.protocols import IDENTITY, Group, State, SummedSubspace

SUM_DTYPES = (torch.float32, torch.bfloat16)
# Sets these random bits apart from all others of a parameter.
SALT = 7


def can_sum(optimizer: LowRankOptimizer, param: Tensor, group: Group) -> bool:
    """Whether an update and a refresh of this parameter can do without the whole gradient."""
    subspace = optimizer.subspace_of(param, group)
    reads_gradient = getattr(optimizer.lift, "reads_gradient", None)
    return (
        subspace is not IDENTITY
        and reads_gradient is not None
        and not reads_gradient(group)
        and isinstance(subspace, SummedSubspace)
        and subspace.sums(group)
    )


class Sums:
    """Sums of one parameter over the micro-batches of one update.

    Args:
        dtype: how they are kept between micro-batches: fp32, or bfloat16 (stochastically rounded).
    """

    def __init__(self, optimizer: LowRankOptimizer, param: Tensor, group: Group, dtype: torch.dtype) -> None:
        self.optimizer, self.param, self.group, self.dtype = optimizer, param, group, dtype
        self.subspace: Any = optimizer.subspace_of(param, group)
        self.state: State = optimizer.state[param] or optimizer.init_state(param, group)
        # The first basis comes from a gradient, all later ones from sums.
        self.has_basis = int(self.state["step"]) > 0
        self.renews = self.has_basis and ("pending" in self.state or refresh_due(self.state, group))
        self.grad_dtype = param.dtype
        self.low: Tensor | None = None
        self.sketch: Tensor | None = None
        self.terms = 0

    def add(self) -> None:
        """Add the images of the parameter's gradient, and free it."""
        if self.param.grad is None:
            return
        grad, self.param.grad = self.subspace.orient(self.param.grad, self.state), None
        self.grad_dtype = grad.dtype
        if not self.has_basis:
            self.has_basis = self.optimizer._refresh(self.subspace, grad, self.state, self.group)
            if not self.has_basis:
                return
        self.terms += 1
        self.low = self._add(self.low, self.subspace.down(grad, self.state, self.group))
        sketch = self.subspace.sketch(grad, self.state, self.group) if self.renews else None
        if sketch is not None:
            self.sketch = self._add(self.sketch, sketch)

    def _add(self, total: Tensor | None, term: Tensor) -> Tensor:
        total = widen(term) if total is None else widen(total).add_(term)
        if self.dtype == torch.bfloat16 and total.dtype == torch.float32:
            return round_to_bfloat16(total, mix_key(self.state["seed"], self.state["step"], SALT + self.terms))
        return total

    def step(self, clip_: Callable[[Tensor], None]) -> None:
        """Make the update; ``clip_`` gets the sum that takes the gradient's place."""
        if self.low is None:
            return
        low, step = widen(self.low), int(self.state["step"])
        clip_(low)
        self.optimizer.step_low(self.param, low, self.group)
        if self.renews and int(self.state["step"]) > step:
            self._renew(low, None if self.sketch is None else widen(self.sketch))

    def _renew(self, low: Tensor, sketch: Tensor | None) -> None:
        start = time.perf_counter()
        largest = float((low if sketch is None else sketch).abs().amax())
        if 0 < largest < float("inf"):
            _, overlap = self.subspace.refresh_from_sums(low, sketch, self.state, self.group, dtype=self.grad_dtype)
            if overlap is not None:
                self.optimizer.rule_of(self.subspace).transport(self.state, overlap, self.group)
        else:
            self.state.pop("pending", None)
            self.optimizer._warn_once("kept an old basis because no new one could be computed")
        self.optimizer.refresh_seconds += time.perf_counter() - start


def widen(tensor: Tensor) -> Tensor:
    """In fp32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
