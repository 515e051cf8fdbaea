"""Bytes of the tensors that a model and its optimizer hold now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer


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
    state = sum(sizes["optimizer"].values())
    return {"weights": sizes["weights"], "gradients": sizes["gradients"], "optimizer": state}


def storage_bytes(tensors: Iterable[Tensor | None], seen: set[int] | None = None) -> int:
    """Bytes of the storages behind tensors, without those in ``seen``, which takes them up."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        # data_ptr() is 0 for every meta tensor; the address of the storage object tells them apart.
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
