"""Bytes of weights, gradients and optimizer state, predicted on the meta device.

They are counted as those of real tensors are, and the predicted state is allocated by the optimizer's own
initialisation, so there is no formula that could drift from the code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.build import DTYPES, build
from lowrank_optim.pretrain.config import Options
from lowrank_optim.pretrain.optimizers import parse_optimizer_args
from lowrank_optim.pretrain.sizes import storage_bytes, tensor_bytes

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")


@dataclass(frozen=True)
class Estimate:
    """What one training job keeps in memory between two steps, in bytes.

    Attributes:
        model: preset name or path.
        optimizer: class name.
        optimizer_args: its arguments, those of the published setting included.
        dtype: of weights and gradients.
        parameters: number of trainable elements.
        low_rank_parameters: how many of them the optimizer compresses.
        parameterization: of the attention and MLP matrices, None for dense ones.
        parameterization_args: its options, those of the published setting included.
        index_bytes: how many bytes of the weights are integers: where sparse values stand.
        by_category: bytes under each of ``CATEGORIES``; a category in ``not_included`` is 0.
        optimizer_by_key: the optimizer's bytes by state key, ``exp_avg``, ``basis``, ...
        not_included: categories that an estimate knows nothing about.
    """

    model: str
    optimizer: str
    optimizer_args: Mapping[str, Any]
    dtype: str
    parameters: int
    low_rank_parameters: int
    by_category: Mapping[str, int]
    optimizer_by_key: Mapping[str, int]
    not_included: tuple[str, ...] = field(default=("activations", "other"))
    parameterization: str | None = None
    parameterization_args: Mapping[str, Any] = field(default_factory=dict)
    index_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of the categories that are included."""
        return sum(self.by_category.values())

    def as_dict(self) -> dict[str, Any]:
        """Every field and ``total_bytes``, ready for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(options: Options) -> Estimate:
    """Exact bytes of weights, gradients and optimizer state, without allocating any of them.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`; with ``per_layer``, the largest gradient is the
            only one.

    Raises:
        UserError, ValueError: unknown model, optimizer, parameterization or argument, or a value out of range.
        RuntimeError: a package that the model or the optimizer needs is not installed.
    """
    run, _, model, optimizer = build(options, "meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    init_state_(optimizer)
    sizes = tensor_bytes(model, optimizer)
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_category["weights"], by_category["gradients"] = sizes["weights"], sizes["gradients"]
    if run.per_layer:
        by_category["gradients"] = max(storage_bytes([p.grad]) for p in model.parameters())
    by_category["optimizer"] = sum(sizes["optimizer"].values())
    return Estimate(
        model=run.model,
        optimizer=run.optimizer,
        optimizer_args=parse_optimizer_args(run.optimizer_args),
        dtype=str(DTYPES[run.dtype]).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        low_rank_parameters=_low_rank_parameters(optimizer),
        by_category=by_category,
        optimizer_by_key=sizes["optimizer"],
        parameterization=run.parameterization,
        parameterization_args=parse_optimizer_args(run.parameterization_args, "parameterization"),
        index_bytes=storage_bytes(t for t in model.state_dict().values() if not t.is_floating_point()),
    )


def init_state_(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of every parameter by the optimizer's own code; parameters are on the meta device.

    Optimizers of torch have no separate initialisation: they take a step without data, so each parameter
    needs a gradient.
    """
    if isinstance(optimizer, LowRankOptimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    optimizer.init_state(p, group)
    elif _is_bitsandbytes(optimizer):
        _init_bitsandbytes_(optimizer)
    else:
        for group in optimizer.param_groups:
            # Ways to compute, which check the device; the state is as large without them.
            group.update(dict.fromkeys({"foreach", "fused", "capturable"} & group.keys(), False))
        with _ScalarsAreOne():  # type: ignore[no-untyped-call]
            optimizer.step()


class _ScalarsAreOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets ``item()`` of a meta tensor return 1, for optimizers that read a norm or a step on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))


def _is_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    if not type(optimizer).__module__.startswith("bitsandbytes."):
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return isinstance(optimizer, Optimizer8bit)


def _init_bitsandbytes_(optimizer: Any) -> None:
    # Paged memory needs CUDA and is as large.
    optimizer.is_paged = False
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            optimizer.init_state(group, p, i, j)


def _low_rank_parameters(optimizer: torch.optim.Optimizer) -> int:
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(math.prod(row.shape) for row in optimizer.explain() if row.method not in ("full-rank", "frozen"))
