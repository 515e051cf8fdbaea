"""What the tests of SLTrain's and LOST's operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every floating-point tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor) and item.is_floating_point():
                self.seen.append(item.numel())
        return out


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """The tensors that the block saves for its backward pass."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def gradients(run: Callable[..., Tensor], leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    """The result of ``run`` and its gradients along ``direction``."""
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = run(*fresh)
    return [y.detach(), *torch.autograd.grad(y, fresh, direction)]
