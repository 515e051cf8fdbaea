"""How a parameter is seen: as a matrix, a stack of matrices, a convolution, or none of these."""

from __future__ import annotations

import sys
import zlib

from torch import Tensor

from lowrank_optim.optim.parts import View


def view_of(param: Tensor, role: str | None, rank: int | None) -> View:
    """The view of one parameter.

    Args:
        role: what it is, where that is known; see :mod:`lowrank_optim.optim.roles`. A tensor of three dimensions
            without a role is a stack of matrices if these could be compressed, else a convolution.
        rank: of its group.
    """
    shape = tuple(param.shape)
    if len(shape) < 2:
        kind = "vector"
    elif len(shape) == 2:
        kind = "matrix"
    elif role == "experts" or (role is None and len(shape) == 3 and min(shape[-2:]) > (rank or 0)):
        kind = "stack"
    else:
        kind = "convolution"
    return View(shape, param.dtype, param.device, kind)


def as_matrices(tensor: Tensor, view: View) -> Tensor:
    """A tensor of the parameter's shape in that of its view, a copy where its strides allow no view."""
    return tensor if tensor.shape == view.shape else tensor.reshape(view.shape)


def seed_of(name: str | None, place: int) -> int:
    """The seed of a parameter's random numbers: from its name, or from its place where it has none."""
    return place if name is None else zlib.crc32(name.encode())


def sharded_class() -> type[Tensor] | None:
    """DTensor, where somebody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    kind = sharded_class()
    return kind is not None and isinstance(tensor, kind)
