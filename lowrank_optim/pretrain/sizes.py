"""Bytes of the tensors that a model and its optimizer hold now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.optim.views import is_sharded


class TensorBytes(TypedDict):
    weights: int
    gradients: int
    optimizer: dict[str, int]


def tensor_bytes(model: nn.Module, optimizer: Optimizer) -> TensorBytes:
    """Bytes of the tensors that a model and its optimizer hold now.

    A storage counts once and whole: tied weights and shared tables are not counted twice, and a view counts
    for everything that it keeps alive.

    Returns:
        ``weights`` (the tensors of the model's state dict), ``gradients``, and ``optimizer`` by state key.
    """
    seen: set[int] = set()
    weights = storage_bytes(model.state_dict(keep_vars=True).values(), seen)
    gradients = storage_bytes((p.grad for p in model.parameters()), seen)
    by_key: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                by_key[key] = by_key.get(key, 0) + storage_bytes([value], seen)
    return {"weights": weights, "gradients": gradients, "optimizer": by_key}


def kept_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """The three sums of :func:`tensor_bytes`; called between a step and ``zero_grad``."""
    sizes = tensor_bytes(model, optimizer)
    return {"weights": sizes["weights"], "gradients": sizes["gradients"], "optimizer": sum(sizes["optimizer"].values())}


class GradientBytes:
    """The most bytes of gradients, and of sums of them, while the backward pass updates parameters.

    Its two methods are hooks of each parameter, before and after the one that uses the gradient up.

    Args:
        sums: the tensors that stand for a parameter's summed gradients.
    """

    def __init__(self, sums: Callable[[Tensor], Iterable[Tensor | None]]) -> None:
        self.sums = sums
        self.most = self._now = 0
        self._of: dict[Tensor, int] = {}

    def arrives(self, param: Tensor) -> None:
        """Count the gradient beside what is kept."""
        self._count(param, [param.grad, *self.sums(param)])
        self.most = max(self.most, self._now)

    def leaves(self, param: Tensor) -> None:
        """Count what is left of it."""
        self._count(param, [param.grad, *self.sums(param)])

    def _count(self, param: Tensor, tensors: Iterable[Tensor | None]) -> None:
        size = sum(local(tensor).nbytes for tensor in tensors if tensor is not None)
        self._now += size - self._of.get(param, 0)
        self._of[param] = size


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if not is_sharded(tensor):
        return tensor
    from lowrank_optim.optim import sharding

    return sharding.local(tensor)


def storage_bytes(tensors: Iterable[Tensor | None], seen: set[int] | None = None) -> int:
    """Bytes of the storages behind tensors, without those in ``seen``, which takes them up."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = local(tensor).untyped_storage()
        # data_ptr() is 0 for every meta tensor; the address of the storage object tells them apart.
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
