"""Operations on tensors, one a file. The eager function is the specification; a Triton twin of the same
name and signature may stand in ``lowrank_kernels``, and :func:`pick` chooses between the two."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

BACKENDS = (None, "eager", "triton")


@functools.cache
def _triton_twin(name: str) -> Any:
    try:
        module = importlib.import_module(f"lowrank_kernels.{name.removesuffix('_')}")
        return getattr(module, name)
    except ImportError as error:
        return error


@functools.cache
def _guarded(twin: Any, index: int) -> Any:
    """Triton launches on the current device, wherever the operands live."""

    @functools.wraps(twin)
    def on_its_device(*args: object, **kwargs: object) -> object:
        with torch.cuda.device(index):
            return twin(*args, **kwargs)

    return on_its_device


def is_gpu(device: torch.device) -> bool:
    """Whether kernels run there."""
    return device.type == "cuda"


def _is_elsewhere(device: torch.device) -> bool:
    """Whether a GPU is not the current one. A compiler sets the device itself; a fake tensor's has no driver."""
    index = device.index
    return (
        index is not None
        and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        and index != torch.cuda.current_device()
        and not torch.compiler.is_compiling()
    )


def pick(eager: F, backend: str | None, device: torch.device) -> F:
    """The implementation of ``eager`` that ``backend`` asks for on ``device``.

    Args:
        eager: an operation of this package.
        backend: None takes Triton on CUDA and ROCm where it can be imported, else eager;
            "eager" and "triton" are obeyed.
        device: where the operands live; a kernel makes it the current device for its launch.

    Raises:
        RuntimeError: "triton" was asked for and cannot run here.
    """
    if backend == "eager":
        return eager
    on_gpu = is_gpu(device)
    if backend is None and not on_gpu:
        return eager
    # Before the import: a kernel that is decorated without TRITON_INTERPRET=1 never runs in the interpreter.
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"backend='triton' needs tensors on a CUDA or ROCm device, got {device}; use backend=None")
    twin = _triton_twin(eager.__name__)
    if isinstance(twin, ImportError):
        if backend is None:
            return eager
        raise RuntimeError(f"backend='triton' has no kernel {eager.__name__!r} here: {twin}") from twin
    # Not a call of typing.cast, which is as long as the rest: this runs several times a matrix and step.
    found: F = _guarded(twin, device.index) if on_gpu and _is_elsewhere(device) else twin
    return found
