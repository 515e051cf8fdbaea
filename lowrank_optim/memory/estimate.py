"""Bytes of weights, gradients and optimizer state, predicted on the meta device.

They are counted as those of real tensors are, and the predicted state is allocated by the optimizer's own
initialisation, so there is no formula that could drift from the code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.optim.accumulation import widen
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.parts import Group, Slot
from lowrank_optim.optim.schedule import scheduled
from lowrank_optim.optim.subspaces.fixed_basis import Columns
from lowrank_optim.optim.views import as_matrices
from lowrank_optim.pretrain.build import DTYPES, build, start_in_backward
from lowrank_optim.pretrain.config import Options, Resolved
from lowrank_optim.pretrain.optimizers import parse_optimizer_args
from lowrank_optim.pretrain.sizes import storage_bytes, tensor_bytes

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")


@dataclass(frozen=True)
class Estimate:
    """What one training job keeps in memory, in bytes: weights, optimizer state, and gradients or their sums.

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
        state_dtype: of the moments, as the bytes per value that most of them take.
        gradients_by_kind: what the gradients consist of when they take most.
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
    state_dtype: str
    gradients_by_kind: Mapping[str, int]
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

    With ``per_layer``, the largest gradient is the only one, beside the sums of micro-batches where there is more than
    one; a refresh that takes two updates counts with what it keeps from one to the next.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`.

    Raises:
        UserError, ValueError: unknown model, optimizer, parameterization or argument, or a value out of range.
        RuntimeError, ImportError: a package that the model or the optimizer needs is not installed.
    """
    run, _, model, optimizer = build(options, "meta")
    start_in_backward(run, optimizer)
    for p in model.parameters():
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format) if p.requires_grad else None
    init_state_(optimizer)
    gradients = gradients_by_kind(run, model, optimizer)
    if isinstance(optimizer, LowRankOptimizer):
        allocate_late_(optimizer)
    sizes = tensor_bytes(model, optimizer)
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_category["weights"], by_category["gradients"] = sizes["weights"], sum(gradients.values())
    by_key = {**sizes["optimizer"], **table_bytes(optimizer)}
    by_category["optimizer"] = sum(by_key.values())
    return Estimate(
        model=run.model,
        optimizer=run.optimizer,
        optimizer_args=parse_optimizer_args(run.optimizer_args),
        dtype=str(DTYPES[run.dtype]).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        low_rank_parameters=_low_rank_parameters(optimizer),
        by_category=by_category,
        optimizer_by_key=by_key,
        state_dtype=state_dtype(optimizer),
        gradients_by_kind=gradients,
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
    elif type(optimizer).__module__.startswith("bitsandbytes."):
        # Paged memory needs CUDA and is as large.
        optimizer.is_paged = False  # type: ignore[attr-defined]
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                optimizer.init_state(group, p, i, j)  # type: ignore[attr-defined]
    else:
        for group in optimizer.param_groups:
            # Ways to compute, which check the device; the state is as large without them.
            group.update(dict.fromkeys({"foreach", "fused", "capturable"} & group.keys(), False))
        with _ScalarsAreOne():  # type: ignore[no-untyped-call]
            optimizer.step()


class Sums(NamedTuple):
    """Bytes of one parameter that is summed at low rank, and of what its refreshes sum beside.

    sketches: in each of the updates that a refresh takes.
    late: what is kept between these updates.
    """

    low: int
    sketches: tuple[int, ...]
    late: int
    gradient: int


def gradients_by_kind(run: Resolved, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What the gradients consist of when they take most; every parameter has one on the meta device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not run.per_layer:
        return {"gradients": storage_bytes(grads)}
    if run.accumulate == 1:
        return {"largest gradient": max(g.nbytes for g in grads)}
    assert isinstance(optimizer, LowRankOptimizer)
    dtype = DTYPES[run.accumulate_dtype]
    sums = low_rank_sums(optimizer, dtype)
    low = {p for p, _ in sums}
    whole = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None and p not in low)
    # While a sum is rounded to fewer bits, the one before is there as well.
    twice = dtype == torch.bfloat16
    largest = max((s.gradient + twice * max(s.low, *s.sketches) for _, s in sums), default=0)
    return {
        "low-rank sums": sum(s.low for _, s in sums),
        "sums for refreshes": _most_sketches(optimizer, sums),
        "whole sums": whole,
        "largest gradient": largest,
    }


def low_rank_sums(optimizer: LowRankOptimizer, dtype: torch.dtype) -> list[tuple[Tensor, Sums]]:
    """The parameters on the meta device, with state and gradient, whose micro-batches are summed at low rank."""
    found: list[tuple[Tensor, Sums]] = []
    known: dict[Any, Sums] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.accumulates(p, group):
                plan = optimizer.plan_of(p, group)
                key = (id(group), plan.view)
                if key not in known:
                    known[key] = _sums(optimizer, p, group, dtype)
                found.append((p, known[key]))
    return found


def _sums(optimizer: LowRankOptimizer, param: Tensor, group: Group, dtype: torch.dtype) -> Sums:
    plan = optimizer.plan_of(param, group)
    subspace: Any = plan.parts.subspace
    assert param.grad is not None
    grad = subspace.orient(as_matrices(param.grad, plan.view), plan.state)

    def size(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        wide = widen(tensor)
        return wide.nbytes // 2 if dtype == torch.bfloat16 and wide.dtype == torch.float32 else wide.nbytes

    late = _late(optimizer, param, {**group, "two_phase": True})
    states = [plan.state, {**plan.state, **late}] if late else [plan.state]
    sketches = [size(subspace.accumulation.sketch(subspace, grad, state, group)) for state in states]
    low = size(subspace.project(grad, plan.state, group))
    return Sums(low, tuple(sketches), sum(t.nbytes for t in late.values()), param.grad.nbytes)


def _most_sketches(optimizer: LowRankOptimizer, sums: Sequence[tuple[Tensor, Sums]]) -> int:
    """The most bytes that sums for refreshes take in one update: of all parameters, or of those whose turn it is."""
    at: Counter[int] = Counter()
    for p, (_, sketches, _, _) in sums:
        group, _, place, _ = optimizer.entry(p)
        gap = group["update_proj_gap"]
        # Without stagger all begin at once, with it each at an update of its own, the last of them before the first.
        begins = (step for step in range(gap) if scheduled({"step": gap + step}, group, place))
        begin = next(begins) if group["stagger"] else 0
        for number, size in enumerate(sketches):
            at[(begin + number) % gap if group["stagger"] else number] += size
    return max(at.values(), default=0)


def table_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Fixed bases, which all parameters share and no state holds."""
    tables: dict[tuple[str, int, torch.dtype], int] = {}
    if isinstance(optimizer, LowRankOptimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                subspace = optimizer.parts_of(p, group).subspace
                if isinstance(subspace, Columns) and subspace.settings(group).basis != "identity":
                    side: int = optimizer.state[p]["side"]
                    tables[subspace.settings(group).basis, side, p.dtype] = side * side * p.element_size()
    return {"shared tables": sum(tables.values())} if tables else {}


def _late(optimizer: LowRankOptimizer, param: Tensor, group: Group) -> dict[str, Tensor]:
    """What a state holds only from one update to the next."""
    return {
        key: torch.full(slot.shape, slot.fill, dtype=slot.dtype, device=param.device)
        for key, slot in optimizer.slots_of(param, group).items()
        if isinstance(slot, Slot) and slot.late
    }


def allocate_late_(optimizer: LowRankOptimizer) -> None:
    """Complete the states by what they hold only between the updates of a refresh, where all come at once."""
    for group in optimizer.param_groups:
        if not group["stagger"]:
            for p in group["params"]:
                if p in optimizer.state:
                    optimizer.state[p].update(_late(optimizer, p, group))


class _ScalarsAreOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets ``item()`` of a meta tensor return 1, for optimizers that read a norm or a step on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))


def _low_rank_parameters(optimizer: torch.optim.Optimizer) -> int:
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(math.prod(row.shape) for row in optimizer.explain() if row.method not in ("full-rank", "frozen"))


def state_dtype(optimizer: torch.optim.Optimizer) -> str:
    """How most bytes of the optimizer's tensors are stored: "float32", "bfloat16", "int8", or "none"."""
    sizes: Counter[str] = Counter()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and not key.startswith(("basis", "indices", "pending")):
                name = str(value.dtype).removeprefix("torch.")
                sizes["int8" if name == "uint8" else name] += value.nbytes
    return max(sizes, key=lambda name: sizes[name], default="none")
