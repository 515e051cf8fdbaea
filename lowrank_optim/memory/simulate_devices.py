"""What the first of many devices stores and moves under FSDP2, from the real training step on tensors without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lowrank_optim.memory.devices import Moved
from lowrank_optim.memory.materialize import allocate_, random_batches
from lowrank_optim.memory.simulate import (
    as_if_with_data,
    shorten_gap_,
    two_parts_of_a_pass,
    with_layers,
    without_cached_tensors,
)
from lowrank_optim.memory.tracker import Block, Tracker
from lowrank_optim.pretrain.build import build_network, optimizer_for, settle
from lowrank_optim.pretrain.config import Options
from lowrank_optim.pretrain.parallel import shard_
from lowrank_optim.pretrain.steps import LossSum

# With a gap of two: the first update, one between refreshes, one with a refresh.
UPDATES = ("first", "between", "refresh")
KINDS = {"allreduce_": 0, "_allgather_base_": 1, "_reduce_scatter_base_": 2}


@dataclass(frozen=True)
class Simulated:
    """Bytes on the first of many devices; attributes as of :class:`lowrank_optim.memory.devices.Footprint`.

    peak: of all storages, activations included.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    model: Moved
    update: Moved
    refresh: Moved


def simulate_sharded(options: Options, number: int, *, layers: int | None = None) -> Simulated:
    """Three updates of the first of ``number`` processes under FSDP2, whose collectives end at once and move nothing.

    The processes are those of torch's "fake" backend: this must run where torch.distributed is not in use.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`.
        layers: run three and four layers and count with what a fourth one adds; None runs all.

    Raises:
        UserError, ValueError, RuntimeError: as :func:`lowrank_optim.pretrain.build.build` raises them.
    """
    if layers is None:
        return _simulated(options, number, None)
    # The peak is where one layer is at work, the next is gathered and the gradients of the one before are on their way.
    three, four = (vars(_simulated(options, number, some)) for some in (3, 4))

    def all_layers(key: str) -> Any:
        if isinstance(three[key], Moved):
            return three[key].plus(four[key].plus(three[key], -1), layers - 3)
        return three[key] + (layers - 3) * (four[key] - three[key])

    return Simulated(**{key: all_layers(key) for key in three})


def _simulated(options: Options, number: int, layers: int | None) -> Simulated:
    from torch.distributed.device_mesh import init_device_mesh

    run, config = settle(options)
    model = build_network(run, config if layers is None else with_layers(config, layers), "meta")
    with _processes(number):
        mesh = init_device_mesh("cpu", (number,))
        with (
            without_cached_tensors(),
            as_if_with_data(),
            two_parts_of_a_pass(),
            FakeTensorMode(allow_non_fake_inputs=True),
            Meter() as meter,
            meter.resizes(),
        ):
            allocate_(model, "cpu")
            network = LossSum(model, chunked=run.chunked_loss)
            shard_(network, model, mesh)
            optimizer = optimizer_for(run, model)
            shorten_gap_(optimizer)
            # Without the peak of the build, in which parameters were whole.
            meter.forget()
            gradients = 0
            for part in UPDATES:
                meter.at = part, "model"
                for batch in random_batches(run, config.vocab_size, "cpu"):
                    network(batch).backward()
                gradients = _local_bytes(p.grad for p in model.parameters())
                meter.at = part, "optimizer"
                optimizer.step()
                optimizer.zero_grad()
        moved = {key: Moved(*counts) for key, counts in meter.moved.items()}
        states = (value for state in optimizer.state.values() for value in state.values())
        between = moved.get(("between", "optimizer"), Moved())
        renewing = moved.get(("refresh", "optimizer"), Moved())
        return Simulated(
            _local_bytes(model.parameters()), gradients, _local_bytes(states), meter.peak().peak_bytes,
            moved["between", "model"], between, renewing.plus(between, -1),
        )  # fmt: skip


def _local_bytes(tensors: Iterator[Any]) -> int:
    from torch.distributed.tensor import DTensor

    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.nbytes for t in local if isinstance(t, Tensor))


@contextmanager
def _processes(number: int) -> Iterator[None]:
    """The first of so many processes, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("A simulation of many devices must run where torch.distributed is not in use")
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Meter(Tracker):  # type: ignore[no-untyped-call]
    """A tracker of the storages of this process, parts of tensors, and of what collectives were given.

    Attributes:
        at: under which bytes are booked.
        moved: by place the bytes of whole tensors that were reduced, gathered, and scattered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at = "", ""
        self.moved: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Within it storages may be resized: FSDP2 frees a gathered parameter so, which no dispatcher sees."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._blocks:
                self._end(self._blocks[id(storage)])
                self._blocks[id(storage)] = self._begin(size)
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize_):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind is not None:
            # The whole is the larger side.
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.moved[self.at][kind] += max(sizes)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _block(self, tensor: Tensor) -> Block:
        # A DTensor has a storage of the whole size, without memory; its part was made out of sight.
        return super()._block(getattr(tensor, "_local_tensor", tensor))
