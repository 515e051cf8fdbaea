"""Kernels run in Triton's interpreter unless a GPU is there, with uninitialised memory poisoned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.triton_interpreter import mend_bfloat16

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    pytest.importorskip("triton")
    if not HAS_GPU:
        mend_bfloat16()
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _what_triton_lacks(request: pytest.FixtureRequest) -> None:
    if "sddmm" in request.node.name and not hasattr(pytest.importorskip("triton.language"), "gather"):
        pytest.skip("the kernel takes triton 3.3 or newer")


@pytest.fixture(autouse=True)
def _poison_empty() -> Iterator[None]:
    """torch.empty returns NaN, so that an element which a kernel forgets shows."""
    # Not a function in the place of torch.empty: a compiler that is imported meanwhile would keep it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
