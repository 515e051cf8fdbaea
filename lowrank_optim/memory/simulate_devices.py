"""What the first of many devices stores and moves under FSDP2, from the real training step on tensors without data."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_optim.memory.devices import Moved
from lowrank_optim.memory.materialize import allocate_, random_batches
from lowrank_optim.memory.simulate import as_if_with_data, two_parts_of_a_pass, with_layers, without_cached_tensors
from lowrank_optim.memory.tracker import without_reading
from lowrank_optim.optim.groups import long_side
from lowrank_optim.pretrain.build import build_network, optimizer_for, settle
from lowrank_optim.pretrain.config import Options
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    from torch.distributed.fsdp import fully_shard

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
        ):
            allocate_(model, "cpu")
            network = LossSum(model, chunked=run.chunked_loss)
            kinds = set(model._no_split_modules or ())
            for module in reversed(list(model.modules())):
                if type(module).__name__ in kinds:
                    fully_shard(module, mesh=mesh, shard_placement_fn=long_side)
            fully_shard(network, mesh=mesh, shard_placement_fn=long_side)
            optimizer = optimizer_for(run, model)
            for group in optimizer.param_groups:
                if group.get("update_proj_gap", 1) > 1:
                    group["update_proj_gap"] = 2
            # Of the build, in which parameters were whole.
            meter.begin()
            gradients = 0
            for part in UPDATES:
                meter.part = part, "model"
                for batch in random_batches(run, config.vocab_size, "cpu"):
                    network(batch).backward()
                gradients = _local_bytes(p.grad for p in model.parameters())
                meter.part = part, "optimizer"
                optimizer.step()
                optimizer.zero_grad()
        moved = {key: Moved(*counts) for key, counts in meter.moved.items()}
        states = (value for state in optimizer.state.values() for value in state.values())
        between = moved.get(("between", "optimizer"), Moved())
        renewing = moved.get(("refresh", "optimizer"), Moved())
        return Simulated(
            _local_bytes(model.parameters()), gradients, _local_bytes(states), meter.peak,
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


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes alive, and what collectives were given; to be entered inside of a ``FakeTensorMode``.

    Attributes:
        part: under which bytes are booked.
        moved: by part the bytes of whole tensors that were reduced, gathered, and scattered.
        peak: bytes of all storages together.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "", ""
        self.moved: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        self.peak = self._alive = 0
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self._alive

    def __enter__(self) -> Meter:
        self._resize = resize = torch.UntypedStorage.resize_

        # FSDP2 frees a gathered parameter by resizing its storage, which no dispatcher sees.
        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._count(id(storage), size)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = without_reading(func, args, kwargs or {})
        kind = KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind is not None:
            # The whole is the larger side.
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.moved[self.part][kind] += max(sizes)
        if func is torch.ops.aten.nonzero.default:
            return result
        # A DTensor has a storage of the whole size, without memory; its part was made out of sight.
        for leaf in (getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(result)):
            if isinstance(leaf, FakeTensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._sizes:
                    self._sizes[id(storage)] = 0
                    weakref.finalize(storage, self._end, id(storage))
                    self._count(id(storage), storage.nbytes())
        return result

    def _count(self, key: int, size: int) -> None:
        self._alive += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self._alive)

    def _end(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)
