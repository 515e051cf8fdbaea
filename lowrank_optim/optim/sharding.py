"""Parameters that are split over processes: the only file of the package that knows DTensor.

FSDP2 hands an optimizer parameters of which every process holds some rows or columns. A step works on plain local
tensors; DTensor appears at its door, in the sums over processes below, and where a state is saved or loaded. Importing
torch.distributed.tensor takes a second: the engine imports this file when it meets a DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from lowrank_optim.ops.adafactor_direction import root_mean_square
from lowrank_optim.optim.finite import host_looks, is_finite, verdict
from lowrank_optim.optim.parts import Group, Number, Parts, Slot, Slots, State, View
from lowrank_optim.optim.schedule import largest
from lowrank_optim.optim.state_storage import PART, decode, scale_slot


class Shards(NamedTuple):
    """Which part of one axis of a parameter this process holds.

    axis: of the parameter.
    start, stop: of the part.
    size: length of the whole axis.
    group: the processes that hold the parts, in order; None where there is one part, the whole.
    mesh, placements: of the parameter.
    """

    axis: int
    start: int
    stop: int
    size: int
    group: dist.ProcessGroup | None
    mesh: Any
    placements: tuple[Any, ...]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.group is not None:
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            dist.all_reduce(values, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The maximum over all processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """This process' part of a whole tensor, a view."""
        return tensor.narrow(axis, self.start, self.stop - self.start)

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """The whole of a tensor that is split along ``axis`` as the parameter is; parts need not be equally long."""
        if self.group is None:
            return tensor
        processes = dist.get_world_size(self.group)
        longest = -(-self.size // processes)
        part = tensor.movedim(axis, 0)
        sent = part.new_zeros((longest, *part.shape[1:]))
        sent[: len(part)].copy_(part)
        whole = part.new_empty((processes * longest, *part.shape[1:]))
        # As bytes: not every backend moves every dtype.
        dist.all_gather_into_tensor(_bytes(whole), _bytes(sent), group=self.group)
        return whole[: self.size].movedim(0, axis)


class Layout(NamedTuple):
    """How the step of one sharded parameter is made.

    split: what this process has of an oriented gradient: "rows" (some rows, the compressed axis is whole), "columns" (a
        part of the compressed axis), "elements" (of a parameter that is not compressed, each of which goes by itself),
        or "whole": weight and gradient are gathered for the step, and the state is whole on every process.
    batch: the number of leading axes of the view that count matrices.
    kept: the axis of the weight that the rows of an oriented gradient run along.
    from_end: the axis that is split, counted from the last one of the view.
    """

    shards: Shards
    split: str
    batch: int = 0
    kept: str | None = None
    from_end: int = -1

    @contextmanager
    def opened(self, param: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and gradient as plain tensors; what is written into the weight is kept."""
        weight, grad = local(param), local(grad)
        if self.split != "whole":
            yield weight, grad
            return
        axis = self.shards.axis
        whole = self.shards.gather(weight, axis)
        yield whole, self.shards.gather(grad, axis)
        weight.copy_(self.shards.take(whole, axis))

    def view(self, view: View, param: Tensor) -> View:
        """The view of what a step works on."""
        if self.split == "whole":
            return view
        shape = local(param).shape
        return view._replace(shape=tuple(shape) if param.ndim == len(view.shape) else (shape[0], *view.shape[1:]))

    def root_mean_square(self, part: Tensor, *, per_matrix: bool) -> Tensor:
        """Of the whole parameter, 0-d, or of every matrix of it, (..., 1, 1)."""
        if self.split == "whole":
            return root_mean_square(part, per_matrix=per_matrix)
        dtype = torch.promote_types(part.dtype, torch.float32)
        axes = (-2, -1) if per_matrix else tuple(range(part.ndim))
        norm = torch.linalg.vector_norm(part, dim=axes, keepdim=per_matrix, dtype=dtype)
        whole = [*part.shape[: self.shards.axis], self.shards.size, *part.shape[self.shards.axis + 1 :]]
        return (self.shards.sum_(norm.square()) / math.prod(whole[axis] for axis in axes)).sqrt()

    def like(self, tensor: Tensor, state: State) -> Tensor:
        """Something of the dtype and device of an oriented gradient whose last axis is whole, without memory."""
        if self.split != "columns":
            return tensor
        return tensor.new_empty(1).expand(*tensor.shape[:-1], state["side"])

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a whole oriented gradient from that of a part that :meth:`like` returned."""
        return (*shape[:-2], self.shards.size, shape[-1]) if self.split == "rows" else tuple(shape)

    def part_of_basis(self, basis: Tensor) -> Tensor:
        """The rows of a basis (..., d, rank) that meet this process' part of the compressed axis."""
        return self.shards.take(basis, basis.ndim - 2)

    def whole_grad(self, grad: Tensor) -> Tensor:
        """The whole of an oriented gradient."""
        axis = {"rows": -2, "columns": -1}.get(self.split)
        return grad if axis is None else self.shards.gather(grad, axis + grad.ndim)

    def axis(self, key: str, slot: Slot) -> int | None:
        """The axis along which one tensor of the state is split, None for none."""
        if self.split == "whole":
            return None
        if key == "weight_correction" or self.split == "elements":
            return self.shards.axis if slot.along == "elements" else None
        # What has the layout of the weight, an error or a momentum, is oriented as the gradient is.
        if slot.along == "elements":
            return self.batch + (self.split == "columns")
        return self.batch if self.split == "rows" and slot.along == self.kept else None

    def slots(self, slots: Slots) -> Slots:
        """This process' part of the slots of a whole parameter."""
        found: Slots = {}
        length = self.shards.stop - self.shards.start
        for key, slot in slots.items():
            axis = self.axis(key, slot) if isinstance(slot, Slot) else None
            if not isinstance(slot, Slot) or axis is None:
                found.setdefault(key, slot)
                continue
            part = slot._replace(shape=(*slot.shape[:axis], length, *slot.shape[axis + 1 :]))
            found[key] = part
            # The scales of a part are those of its own blocks.
            if key.endswith(".codes"):
                found[f"{key.removesuffix('.codes')}.scale"] = scale_slot(part)
        if self.split != "whole":
            numbers = zip(PART, (self.from_end, self.shards.size, self.shards.start))
            found.update({key: Number(value, fixed=True) for key, value in numbers})
        return found

    def largest(self, grad: Tensor, batch: tuple[int, ...]) -> list[float]:
        """The largest magnitude in every matrix over all processes, infinite where one is not finite."""
        sizes = largest(grad, batch) if grad.numel() else grad.new_zeros(math.prod(batch)).real
        known = sizes.to(torch.float32, copy=True).nan_to_num_(nan=torch.inf)
        found: list[float] = self.shards.max_(known).tolist()
        return found

    def wrap(self, state: State, slots: Slots) -> State:
        """A local state as DTensors.

        Blocks of 8 bits do not end where parts do: such moments are saved as values, however many processes there are.
        """
        found: State = {}
        for key, value in state.items():
            base, _, suffix = key.partition(".")
            slot, codes = slots.get(key), slots.get(f"{base}.codes")
            if isinstance(codes, Slot) and f"{base}.zero" not in slots:
                if suffix == "codes":
                    found[base] = self._wrap(decode(state, base), self.axis(key, codes))
            elif isinstance(slot, Slot) and value.ndim > 0:
                found[key] = self._wrap(value, self.axis(key, slot))
            elif key not in PART:
                found[key] = value
        return found

    def _wrap(self, part: Tensor, axis: int | None) -> Tensor:
        part, shape = part.contiguous(), list(part.shape)
        if axis is not None:
            shape[axis] = self.shards.size
        whole = torch.empty(shape, device="meta")
        wrapped: Tensor = DTensor.from_local(
            part, self.shards.mesh, self._placements(axis), run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return wrapped

    def _placements(self, axis: int | None) -> tuple[Any, ...]:
        kind = Replicate() if axis is None else Shard(axis)
        return tuple(kind if isinstance(placement, Shard) else placement for placement in self.shards.placements)

    def unwrap(self, state: Mapping[str, Any], slots: Slots) -> State:
        """This process' part of a saved state of DTensors of any layout, or of whole tensors."""
        found: State = {}
        saved = dict(state)
        for key, codes in slots.items():
            base = key.removesuffix(".codes")
            if base == key or key not in saved or f"{base}.zero" in slots or not isinstance(codes, Slot):
                continue
            if self.axis(key, codes) is not None:
                # Nor do the blocks of a whole moment.
                saved[base] = decode(saved, base)
                del saved[key], saved[f"{base}.scale"]
        for key, value in saved.items():
            slot = slots.get(key)
            if not isinstance(slot, Slot):
                # Codes here, values there.
                slot = slots.get(f"{key}.codes", slots.get(key.partition(".")[0]))
            axis = self.axis(key, slot) if isinstance(slot, Slot) else None
            if isinstance(value, DTensor) and axis is not None and value.placements == self._placements(axis):
                found[key] = local(value)
            elif isinstance(value, Tensor) and value.ndim > 0:
                found[key] = self._part(value.full_tensor() if isinstance(value, DTensor) else value, axis)
            else:
                found[key] = value
        return found

    def _part(self, whole: Tensor, axis: int | None) -> Tensor:
        return whole if axis is None or whole.shape[axis] != self.shards.size else self.shards.take(whole, axis)


def _bytes(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1).view(torch.uint8)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which may be no DTensor."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor, which may be no DTensor; every process must ask."""
    values: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return values


def part_of(values: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, split as ``target`` is, which may be no DTensor."""
    if not isinstance(target, DTensor):
        return values
    shards = shards_of(target)
    part = shards.take(values, shards.axis).to(target.device).contiguous()
    parted: Tensor = DTensor.from_local(
        part, shards.mesh, shards.placements, run_check=False, shape=target.shape, stride=target.stride()
    )
    return parted


def room_for(like: Tensor, param: Tensor) -> Tensor:
    """An empty tensor of the shape and dtype of one in the state of a parameter, split along the same axis if it can.

    Args:
        like: the whole, on the meta device.
        param: whose state it is; a tensor that is not split has room for the whole.
    """
    if not isinstance(param, DTensor):
        return torch.empty(like.shape, dtype=like.dtype, device=param.device)
    shards = shards_of(param)
    axes = [axis for axis, length in enumerate(like.shape) if length == shards.size]
    axis = shards.axis if like.shape == param.shape else axes[0] if axes else None
    if axis is None:
        return torch.empty(like.shape, dtype=like.dtype, device=local(param).device)
    placements = [Shard(axis) if isinstance(placement, Shard) else placement for placement in shards.placements]
    made: Tensor = empty(like.shape, dtype=like.dtype, device_mesh=shards.mesh, placements=placements)
    return made


def shards_of(param: Any) -> Shards:
    """How a DTensor is split.

    Raises:
        ValueError: along more than one axis of a mesh, or in a way that FSDP2 alone does not use.
    """
    placements: tuple[Any, ...] = tuple(param.placements)
    mesh = param.device_mesh
    split = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(split) > 1 or any(type(placements[i]) is not Shard for i in split):
        raise ValueError(
            f"Invalid placements: {placements} of a parameter of shape {tuple(param.shape)}, expected Shard(dim) along "
            "one axis of the mesh at most, as fully_shard makes them"
        )
    if not split:
        size = param.shape[0] if param.ndim else 1
        return Shards(0, 0, size, size, None, mesh, placements)
    (along,) = split
    processes, rank = mesh.size(along), mesh.get_local_rank(along)
    axis: int = placements[along].dim % param.ndim
    size = param.shape[axis]
    # As torch.chunk does.
    longest = -(-size // processes)
    start, stop = (min(i * longest, size) for i in (rank, rank + 1))
    return Shards(axis, start, stop, size, mesh.get_group(along), mesh, placements)


def layout_for(shards: Shards, ndim: int, view: View, parts: Parts, group: Group) -> Layout:
    """How a parameter of so many dimensions is stepped that is split in some way.

    Raises:
        ValueError: moments of 4 bits, two of which share a byte that a split may part.
    """
    if group["state_dtype"] == "int4":
        raise ValueError(
            "Invalid state_dtype: 'int4' for a sharded parameter, expected 'int8', 'bfloat16' or 'float32'"
        )
    subspace, batch = parts.subspace, len(view.batch)
    if shards.group is None:
        return Layout(shards, "whole", batch)
    if subspace is None:
        return Layout(
            shards,
            "elements" if parts.rule.elementwise else "whole",
            batch,
            from_end=shards.axis - ndim - view.dtype.is_complex,
        )
    kept = subspace.kept_axis(view, group)
    # Of a convolution that is seen as a matrix, only the rows are an axis of the parameter.
    rows = ndim - 2 if ndim == len(view.shape) else 0
    axes = {rows: "rows", rows + 1: "columns"} if ndim == len(view.shape) else {0: "rows"}
    axis = axes.get(shards.axis)
    split = "whole"
    if kept is not None and axis is not None:
        split = "rows" if axis == kept else "columns"
    able = subspace.splits & parts.lift.splits
    if parts.lift.needs_norms and not parts.rule.rowwise:
        able = frozenset()
    return Layout(shards, split if split in able else "whole", batch, kept, -2 if axis == "rows" else -1)


def _flag(ok: bool | Tensor, device: torch.device) -> Tensor:
    return is_finite(ok) if isinstance(ok, Tensor) else torch.tensor(ok, device=device)


def agree(gradients: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, bool | Tensor]:
    """For every sharded parameter whether its gradient is finite on all processes, by one message a process group.

    Args:
        gradients: parameters and their gradients, in the same order on all processes.
    """
    by_group: dict[dist.ProcessGroup, list[tuple[Tensor, Tensor]]] = {}
    found: dict[Tensor, bool | Tensor] = {}
    for param, grad in gradients:
        if isinstance(param, DTensor):
            shards = shards_of(param)
            ok = verdict(local(grad))
            if shards.group is None:
                found[param] = ok
            else:
                by_group.setdefault(shards.group, []).append((param, _flag(ok, local(grad).device)))
    for group, verdicts in by_group.items():
        flags = torch.stack([ok for _, ok in verdicts]).to(torch.float32)
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
        finite = flags > 0
        # A verdict of the device is a number, finite or not.
        values = finite.tolist() if host_looks(finite.device) else torch.where(finite, flags, torch.nan).unbind()
        found.update(zip((param for param, _ in verdicts), values))
    return found
