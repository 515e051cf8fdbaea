"""Which storages are alive while code runs under fake tensors, and which of them make up the peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_optim.memory.estimate import CATEGORIES

_aten = torch.ops.aten


@dataclass(eq=False)
class Block:
    """One storage: its bytes, the phase and the layer that made it, and what it turned out to be.

    made_in, freed_in: numbers of the passes (one forward, backward or update each) in which it lived; what is never
        freed has None.
    """

    size: int
    phase: str
    layer: str
    made_in: int
    freed_in: int | None = None
    label: str = ""

    @property
    def alive(self) -> bool:
        return self.freed_in is None

    @property
    def category(self) -> str:
        if self.label:
            return self.label
        if self.phase != "update":
            return "activations"
        return "optimizer" if self.alive else "other"


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive together, and what they were.

    Attributes:
        peak_bytes: their sum.
        by_category: bytes under each of ``CATEGORIES``.
        most_by_category: the most that each category had, whenever that was.
        by_layer: bytes by the module at work when they were made, largest first; weights and optimizer state left out.
        update: name of the part of the run, see :meth:`Tracker.part`.
        phase: ``forward``, ``backward`` or ``update``.
        layer: the module at work.
    """

    peak_bytes: int
    by_category: dict[str, int]
    most_by_category: dict[str, int]
    by_layer: dict[str, int]
    update: str
    phase: str
    layer: str


class Recording(NamedTuple):
    """What a function did to a state and to the bytes alive.

    events: blocks that it made (+1) and ended (-1), in order.
    made: those that a tensor of the state holds now, with its name, shape, strides and dtype.
    ended: those that a tensor of the state held, with its name.
    numbers: values of the state that are no tensors and have changed.
    gone: names that the state no longer has.
    """

    events: list[tuple[Block, int]]
    made: dict[Block, tuple[str, torch.Size, tuple[int, ...], torch.dtype]]
    ended: dict[Block, str]
    numbers: dict[str, Any]
    gone: set[str]
    result: Any


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every storage that an operation makes, and its end; to be entered inside of a ``FakeTensorMode``.

    A storage is what :meth:`label` said it is. Else it is "activations" if it was made in forward or backward, and if
    it was made in an update, "optimizer" where it outlives the run and "other" where it does not. Values that the host
    reads (``item()``, ``if tensor``) are 1, and masks hold everywhere, so that the code goes on.

    Args:
        alike: the path of a layer that stands for several, each with the same bytes.
        times: how many.
    """

    def __init__(self, alike: str | None = None, times: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self._alike, self._times = alike, times
        self._pass = self._passes = 0
        self._layers: list[str] = []
        self._layer_of_backward = "loss"
        self._blocks: dict[int, Block] = {}
        # Changes of what is alive: the block, +1 or -1, and who was at work.
        self._events: list[tuple[Block, int, str, str]] = []
        self._parts: list[tuple[int, str]] = [(0, "build")]
        self._recordings: dict[Hashable, Recording] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Half of all calls. The mode below would give the same answer.
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        result = without_reading(func, args, kwargs or {})
        # Of a mask that holds everywhere it is larger than any in a run.
        if func is _aten.nonzero.default:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._block(leaf)
        return result

    def label(self, tensors: Iterable[Tensor | None], category: str, layer: str | None = None) -> None:
        """Say what tensors are, for the whole life of their storages, and to which layer they belong."""
        for tensor in tensors:
            if tensor is not None:
                block = self._block(tensor)
                block.label = category
                block.layer = block.layer if layer is None else layer

    @contextmanager
    def during(self, phase: str, layer: str = "") -> Iterator[None]:
        """Book what happens inside to a phase, and to a layer where it is named."""
        before, self.phase, self._pass = (self.phase, self._pass), phase, self._passes + 1
        self._passes += 1
        if phase == "backward":
            self._layer_of_backward = "loss"
        if layer:
            self._layers.append(layer)
        try:
            yield
        finally:
            self.phase, self._pass = before
            if layer:
                self._layers.pop()

    def part(self, name: str) -> None:
        """Name the part of the run that begins."""
        self._parts.append((len(self._events), name))

    def forget(self) -> None:
        """Forget everything but what is alive."""
        self._events = [(block, 1, block.phase, block.layer) for block in self._blocks.values()]

    def alike(self, key: Hashable, state: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run a function, or do once more what one with the same key did to its state and to the bytes alive.

        Only the first runs, and a second one where the first made something that outlives it and is not in the state,
        such as a table that others share.

        Args:
            key: the same for functions that do the same, and start from states that are alike.
            state: all that they change but for the values of tensors.
            run: returns no tensor.
        """
        if key in self._recordings:
            return self._repeat(self._recordings[key], state)
        before: dict[str, Any] = {k: self._block(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        start = len(self._events)
        result = run()
        events = [(block, sign) for block, sign, *_ in self._events[start:]]
        new = {block for block, sign in events if sign > 0}
        made = {
            self._block(v): (k, v.shape, v.stride(), v.dtype)
            for k, v in state.items()
            if isinstance(v, Tensor) and self._block(v) in new
        }
        held = {block: k for k, block in before.items() if isinstance(block, Block)}
        ended = {block: held.get(block, "") for block, sign in events if sign < 0 and block not in new}
        if all(not block.alive or block in made for block in new) and all(ended.values()):
            numbers = {k: v for k, v in state.items() if not isinstance(v, Tensor) and before.get(k) is not v}
            self._recordings[key] = Recording(events, made, ended, numbers, before.keys() - state.keys(), result)
        return result

    def _repeat(self, recording: Recording, state: dict[str, Any]) -> Any:
        before = {block: state.pop(name) for block, name in recording.ended.items()}
        blocks: dict[Block, Block] = {}
        for block, sign in recording.events:
            if block in before:
                del before[block]
            elif block in recording.made:
                name, *layout, dtype = recording.made[block]
                state[name] = torch.empty_strided(*layout, dtype=dtype)
            elif sign > 0:
                blocks[block] = self._begin(block.size)
            else:
                self._end(blocks.pop(block))
        state.update(recording.numbers)
        for name in recording.gone & state.keys():
            del state[name]
        return recording.result

    def watch(self, model: nn.Module) -> None:
        """Book operations to the module whose forward or backward pass they belong to."""
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, name=name: self._layers.append(name))
                module.register_forward_hook(lambda _, __, out, name=name: self._leave(name, out), always_call=True)

    def peak(self) -> Peak:
        """The peak of everything that was recorded."""
        total = highest = at = 0
        now, most = Counter(dict.fromkeys(CATEGORIES, 0)), Counter(dict.fromkeys(CATEGORIES, 0))
        for i, (block, sign, _, layer) in enumerate(self._events):
            total += sign * self._bytes(block)
            now[block.category] += sign * self._bytes(block)
            # Between its neighbours a layer that stands for several has not the bytes of any of them.
            if self._is_alike(layer):
                continue
            most |= now
            if total > highest:
                highest, at = total, i
        alive: dict[Block, None] = {}
        for block, sign, *_ in self._events[: at + 1]:
            if sign > 0:
                alive[block] = None
            else:
                del alive[block]
        by_category, by_layer = Counter(dict.fromkeys(CATEGORIES, 0)), Counter[str]()
        for block in alive:
            by_category[block.category] += self._bytes(block)
            if block.category not in ("weights", "optimizer"):
                by_layer[block.layer] += self._bytes(block)
        phase, layer = self._events[at][2:]
        part = [name for start, name in self._parts if start <= at][-1]
        return Peak(highest, dict(by_category), dict(most), dict(by_layer.most_common()), part, phase, layer)

    def _is_alike(self, layer: str) -> bool:
        return self._alike is not None and f"{layer}.".startswith(f"{self._alike}.")

    def _bytes(self, block: Block) -> int:
        """A block's bytes, those of the layers included that its own stands for.

        What ends in the pass that made it is handed on to the next layer, so that there is one of it.
        """
        several = self._is_alike(block.layer) and block.made_in != block.freed_in
        return block.size * (self._times if several else 1)

    def _at_work(self) -> str:
        return self._layers[-1] if self._layers else self._layer_of_backward

    def _leave(self, name: str, output: Any) -> None:
        # Recomputation ends in the middle of a layer, by an exception.
        while self._layers.pop() != name:
            pass
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                # Called when the gradient of the output is there, that is before the backward pass of this module.
                leaf.register_hook(lambda _: setattr(self, "_layer_of_backward", name))  # type: ignore[no-untyped-call]

    def _block(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        block = self._blocks.get(id(storage))
        if block is None:
            block = self._blocks[id(storage)] = self._begin(storage.nbytes())
            weakref.finalize(storage, self._forget, id(storage))
        return block

    def _forget(self, key: int) -> None:
        self._end(self._blocks.pop(key))

    def _begin(self, size: int) -> Block:
        block = Block(size, self.phase, self._at_work(), self._pass)
        self._events.append((block, 1, self.phase, block.layer))
        return block

    def _end(self, block: Block) -> None:
        block.freed_in = self._pass
        self._events.append((block, -1, self.phase, self._at_work()))


def without_reading(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on tensors without data: values that the host reads are 1, and masks hold everywhere."""
    if func is _aten._local_scalar_dense.default:
        return 1.0 if args[0].dtype.is_floating_point else 1
    if func is _aten.nonzero.default:
        return torch.stack(_everywhere(args[0]), dim=1)
    if func in (_aten.index.Tensor, _aten.index_put_.default):
        args = (args[0], _without_masks(args[1]), *args[2:])
    return func(*args, **kwargs)


def _everywhere(mask: Tensor) -> list[Tensor]:
    """Where a mask holds that holds everywhere: as many index tensors as it has dimensions."""
    return [mask.new_empty(mask.numel(), dtype=torch.int64) for _ in range(mask.ndim)]


def _without_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    plain: list[Tensor | None] = []
    for index in indices:
        plain += _everywhere(index) if index is not None and index.dtype == torch.bool else [index]
    return plain
