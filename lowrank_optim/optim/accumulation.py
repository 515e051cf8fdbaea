"""Micro-batches summed at low rank: R = Σ G_i P in place of Σ G_i, and what a refresh needs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank_optim.ops.rounding import mix_key, round_to_bfloat16
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.parts import Group
from lowrank_optim.optim.schedule import largest, refresh_due, select_matrices
from lowrank_optim.optim.state_storage import SALTS
from lowrank_optim.optim.views import as_matrices

Mean: TypeAlias = Callable[[Tensor], Tensor]

SUM_DTYPES = (torch.float32, torch.bfloat16)


class Accumulator:
    """Sums of one parameter over the micro-batches of one update.

    Args:
        dtype: how they are kept between micro-batches: fp32, or bfloat16 (stochastically rounded).
        mean_: turns a tensor into its mean over data-parallel processes.
    """

    def __init__(
        self, optimizer: LowRankOptimizer, param: Tensor, group: Group, dtype: torch.dtype, mean_: Mean
    ) -> None:
        self.optimizer, self.param, self.group, self.dtype, self.mean_ = optimizer, param, group, dtype, mean_
        self.plan = optimizer.plan_of(param, group)
        self.subspace: Any = self.plan.parts.subspace
        self.state = self.plan.state
        # The first basis comes from a gradient, all later ones from sums.
        self.has_basis = int(self.state["step"]) > 0 and not self.state["waiting"]
        self.renews = self.has_basis and ("pending" in self.state or refresh_due(self.state, group, self.plan.place))
        self.grad_dtype = param.dtype
        self.low: Tensor | None = None
        self.sketch: Tensor | None = None
        self.terms = 0

    def add(self) -> None:
        """Add the images of the parameter's gradient, and free it."""
        if self.param.grad is None:
            return
        grad, self.param.grad = as_matrices(self.param.grad, self.plan.view), None
        grad = self.subspace.orient(grad, self.state)
        self.grad_dtype = grad.dtype
        if not self.has_basis:
            # All processes take the same basis.
            self.mean_(grad)
            if not self.optimizer.refresh(self.plan, grad, self.group, is_scheduled=not self.state["waiting"]):
                return
            # Matrices without a gradient so far take their basis from a later micro-batch.
            self.has_basis = not self.state["waiting"]
        self.terms += 1
        self.low = self._add(self.low, self.subspace.project(grad, self.state, self.group))
        sketch = None
        if self.renews:
            sketch = self.subspace.accumulation.sketch(self.subspace, grad, self.state, self.group)
        if sketch is not None:
            self.sketch = self._add(self.sketch, sketch)

    def _add(self, total: Tensor | None, term: Tensor) -> Tensor:
        total = widen(term) if total is None else widen(total).add_(term)
        if self.dtype == torch.bfloat16 and total.dtype == torch.float32:
            return round_to_bfloat16(total, mix_key(self.state["seed"], self.state["step"], SALTS["sum"] + self.terms))
        return total

    def step(self, clip_: Callable[[Tensor], None]) -> None:
        """Make the update; ``clip_`` gets the sum that takes the gradient's place."""
        if self.low is None:
            return
        low, step = self.mean_(widen(self.low)), int(self.state["step"])
        clip_(low)
        self.optimizer.step_low(self.param, low, self.group)
        if self.renews and int(self.state["step"]) > step:
            self._renew(low, None if self.sketch is None else self.mean_(widen(self.sketch)))

    def _renew(self, low: Tensor, sketch: Tensor | None) -> None:
        start = time.perf_counter()
        sizes = largest(low if sketch is None else sketch, self.plan.view.batch).tolist()
        which = None
        if all(size < float("inf") for size in sizes):
            which, _ = select_matrices(self.subspace, sizes, self.plan.view, self.state, low.device, is_scheduled=True)
        if which is None:
            self.state.pop("pending", None)
            self.optimizer._warn_once("kept an old basis because no new one could be computed")
        else:
            result = self.subspace.accumulation.refresh(
                self.subspace, low, sketch, self.state, self.group, which, self.grad_dtype
            )
            self.optimizer.transport(self.plan, result, self.group)
        self.optimizer.refresh_seconds += time.perf_counter() - start


def widen(tensor: Tensor) -> Tensor:
    """In fp32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
