"""Kernels run in Triton's interpreter unless a GPU is there, with uninitialised memory poisoned."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.interpreter import mend_bfloat16

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is decorated, so before lowrank_kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    pytest.importorskip("triton")
    if not HAS_GPU:
        mend_bfloat16()
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like return NaN, so that an element which a kernel forgets shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)
