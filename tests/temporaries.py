"""Counts the tensors as large as a weight that an operation allocates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountTemporaries(TorchDispatchMode):
    """Within the mode, ``created`` names every operation that returned new memory for ``numel`` elements or more.

    Views and in-place operations return memory that is known already, so they do not count. Memory that a kernel
    allocates and frees inside does not show.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.created: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel and storage_of(tensor) not in known:
                self.created.append(str(func))
        return result


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
