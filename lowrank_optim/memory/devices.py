"""What each of several devices stores and moves, in closed form: the formulas of docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.memory.estimate import init_state_, table_bytes
from lowrank_optim.memory.simulate import layers_of, with_layers
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.groups import long_axis
from lowrank_optim.optim.parts import Group, Slot, View
from lowrank_optim.optim.subspaces.fixed_basis import Columns
from lowrank_optim.optim.subspaces.singular import TopSingular
from lowrank_optim.optim.subspaces.tracking import Tracking
from lowrank_optim.pretrain.build import build_network, optimizer_for, settle
from lowrank_optim.pretrain.config import QUANTIZED, Options
from lowrank_optim.pretrain.sizes import storage_bytes

STRATEGIES = ("ddp", "fsdp")


class Devices(NamedTuple):
    """How many devices train together, each with one process, and with copies ("ddp") or parts ("fsdp") of a model."""

    number: int = 1
    strategy: str = "ddp"

    @property
    def splits(self) -> bool:
        """Whether a device has a part of every parameter."""
        return self.number > 1 and self.strategy == "fsdp"


ALONE = Devices()


class Moved(NamedTuple):
    """Bytes of the tensors that processes sum, gather, or sum and scatter: of whole tensors."""

    reduced: int = 0
    gathered: int = 0
    scattered: int = 0

    def plus(self, other: Moved, times: float = 1) -> Moved:
        """Both together."""
        return Moved(*(round(a + times * b) for a, b in zip(self, other)))

    def sent(self, number: int) -> int:
        """What a device sends, and receives, where every collective goes around a ring: twice for a sum."""
        return round((2 * self.reduced + self.gathered + self.scattered) * (number - 1) / number)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the first device, which has the largest part of what does not divide.

    Attributes:
        weights, gradients, optimizer: what it keeps.
        gathered: whole parameters and gradients that FSDP2 holds beside them.
        model: moved for weights and gradients, under FSDP2 in every micro-batch, else in an update.
        low_rank: the same with :class:`lowrank_optim.distributed.LowRankAllReduce`, between refreshes.
        update: moved by the optimizer in every update.
        refresh: in addition in one that renews all bases.
        gap: updates from one refresh to the next.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    model: Moved
    low_rank: Moved
    update: Moved
    refresh: Moved
    gap: int

    @property
    def stored(self) -> int:
        """All that a device holds at once but activations."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    def sent(self, devices: Devices, accumulate: int = 1) -> int:
        """What a device sends in an update of so many micro-batches, in the mean over refreshes."""
        if devices.number == 1:
            return 0
        model = Moved().plus(self.model, accumulate if devices.splits else 1)
        return model.plus(self.update).plus(self.refresh, 1 / self.gap).sent(devices.number)

    def sent_at_low_rank(self, devices: Devices) -> int:
        """The same with gradients that are summed at low rank between refreshes."""
        return self.low_rank.plus(self.model, 1 / self.gap).plus(self.low_rank, -1 / self.gap).sent(devices.number)


def footprint(options: Options, devices: Devices) -> Footprint:
    """The bytes of a job on each of several devices, without a process of them.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`.
        devices: how it is spread.

    Raises:
        UserError, ValueError, RuntimeError: as :func:`lowrank_optim.pretrain.build.build` raises them.
        ValueError: quantized weights or a parameterization, which are not counted here.
    """
    run, config = settle(options)
    if run.weights in QUANTIZED or run.parameterization:
        found = run.weights if run.weights in QUANTIZED else run.parameterization
        raise ValueError(f"Invalid weights: {found!r} on several devices, expected dense ones in 'bf16'")
    # What repeats is counted as often as it does.
    network = build_network(run, with_layers(config, 1), "meta")
    optimizer = optimizer_for(run, network)
    return footprint_of(network, optimizer, config.num_hidden_layers, devices)


def footprint_of(network: Any, optimizer: torch.optim.Optimizer, layers: int, devices: Devices) -> Footprint:
    """:func:`footprint` of a model of ``layers`` layers, from one of a single layer on the meta device."""
    path = layers_of(network, 1)
    inside = {p for name, p in network.named_parameters() if name.startswith(f"{path}.")}
    count = {p: layers if p in inside else 1 for p in network.parameters()}
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p in count:
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
    init_state_(optimizer)
    weights = gradients = 0
    whole: dict[Tensor, int] = {}
    state = sum(table_bytes(optimizer).values())
    model, low_rank, update, refresh = Moved(), Moved(), Moved(), Moved()
    for p, times in count.items():
        part, padded = part_of(p, devices.number) if devices.splits else (p.nbytes, p.nbytes)
        weights += times * part
        gradients += times * part
        state += times * state_bytes(optimizer, p, groups[p], devices)
        once, renewed = exchanged(optimizer, p, groups[p], devices)
        update, refresh = update.plus(once, times), refresh.plus(renewed, times)
        if devices.splits:
            # What is in no layer stays whole from the forward to the backward pass.
            passes = 2 if p in inside else 1
            model = model.plus(Moved(0, passes * padded, padded), times)
            whole[p] = padded
        elif devices.number > 1:
            model = model.plus(Moved(p.nbytes), times)
            low_rank = low_rank.plus(Moved(low_rank_bytes(optimizer, p, groups[p])), times)
    gap = max((group.get("update_proj_gap", 1) for group in optimizer.param_groups), default=1)
    layer = sum(size for p, size in whole.items() if p in inside)
    head = whole.get(network.get_output_embeddings().weight, 0)
    gathered = held_whole(sum(whole.values()) - layer, head, layer, devices.number)
    return Footprint(weights, gradients, state, gathered, model, low_rank, update, refresh, gap)


def held_whole(outside: int, head: int, layer: int, number: int) -> int:
    """Bytes that FSDP2 holds beside all parts of weights and gradients when it holds most.

    Near the end of the backward pass, in the second layer: what is in no layer, with the gradient of the head; weights
    and gradients of the layer, the gathered weights of the next one, and the gradients of the one before on their way.
    Or after the last layer: what is in no layer, all of its gradients, and those of the layer on their way.

    Args:
        outside, head, layer: bytes of what is in no layer, of the head, and of one layer.
    """
    parts = outside // number
    return max(outside + head + 4 * layer - 2 * layer // number - parts, 2 * outside + layer - parts)


def part_of(param: Tensor, number: int) -> tuple[int, int]:
    """Bytes of the first device's part of a parameter, and of all parts as long as this one."""
    shards = first_part(param, number)
    part = param.nbytes // max(shards.size, 1) * shards.stop
    return part, part * number


def first_part(param: Tensor, number: int) -> Any:
    """What the first of so many processes has of a parameter, as ``long_side`` splits it."""
    from lowrank_optim.optim.sharding import Shards

    axis = long_axis(param.shape, number)
    size = param.shape[axis]
    # No process is asked: any group will do.
    group: Any = number if number > 1 else None
    return Shards(axis, 0, -(-size // number), size, group, None, ())


def state_bytes(optimizer: torch.optim.Optimizer, param: Tensor, group: Group, devices: Devices) -> int:
    """Bytes of a parameter's state, which exists, or of the first device's part of it."""
    tensors = [value for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    if not devices.splits:
        return storage_bytes(tensors)
    shards = first_part(param, devices.number)
    if isinstance(optimizer, LowRankOptimizer):
        slots = optimizer.split(param, group, shards)[2].values()
        kept = [slot for slot in slots if isinstance(slot, Slot) and not slot.late]
        return sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in kept)
    # What is elementwise is split as the parameter is.
    return sum(t.nbytes // max(shards.size, 1) * shards.stop if t.shape == param.shape else t.nbytes for t in tensors)


def low_rank_bytes(optimizer: torch.optim.Optimizer, param: Tensor, group: Group) -> int:
    """What of a gradient :class:`lowrank_optim.distributed.LowRankAllReduce` sends between refreshes."""
    from lowrank_optim.distributed import reason_to_send_whole

    if not isinstance(optimizer, LowRankOptimizer) or reason_to_send_whole(optimizer, param) is not None:
        return param.nbytes
    plan = optimizer.plan_of(param, group)
    assert plan.parts.subspace is not None
    return math.prod(plan.parts.subspace.low_shape(plan.view, group)) * param.element_size()


def exchanged(optimizer: torch.optim.Optimizer, param: Tensor, group: Group, devices: Devices) -> tuple[Moved, Moved]:
    """What the step of one parameter moves in every update, and in addition at a refresh of its basis.

    Single numbers are left out: flags of gradients that are not finite, norms, the largest entry of a product.
    """
    nothing = Moved(), Moved()
    if not devices.splits or not isinstance(optimizer, LowRankOptimizer):
        return nothing
    view, parts, _, layout = optimizer.split(param, group, first_part(param, devices.number))
    subspace, rule, lift = parts
    if layout.split == "elements":
        return nothing
    whole = part_of(param, devices.number)[1]
    if layout.split == "whole" or subspace is None:
        # Weight and gradient.
        return Moved(gathered=2 * whole), Moved()
    *batch, rows, d = subspace.oriented_shape(view, group)
    matrices, rank = math.prod(batch), subspace.rank(view.shape, group)
    if layout.split == "columns":
        reduced = matrices * rows * (rank + lift.needs_norms) * view.wide.itemsize
        return Moved(reduced), Moved(gathered=whole if subspace.refreshes else 0)
    low = 0 if rule.rowwise else whole // d * rank // view.dtype.itemsize * view.wide.itemsize
    return Moved(gathered=low), renewal(subspace, view, group, matrices, d, rank, whole)


def renewal(subspace: Any, view: View, group: Group, matrices: int, d: int, rank: int, whole: int) -> Moved:
    """What a refresh moves where every process has some rows of the matrices."""
    if isinstance(subspace, TopSingular) and group["refresh"] == "svd":
        return Moved(gathered=whole)
    if isinstance(subspace, TopSingular) and group["refresh"] == "randomized":
        columns = min(d, rank + rank // 8 + 8)
        return Moved(matrices * columns * (3 * d + columns) * view.wide.itemsize)
    if isinstance(subspace, (TopSingular, Tracking)):
        return Moved(matrices * d * rank * view.wide.itemsize)
    return Moved(matrices * d * view.wide.itemsize) if isinstance(subspace, Columns) else Moved()
