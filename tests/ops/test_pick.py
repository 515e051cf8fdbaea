"""Which implementation runs, and on which device; the driver is a stub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lowrank_optim import ops

seen: list[int] = []


def operation(x: int, *, y: int) -> tuple[int, int, list[int]]:
    raise AssertionError("eager")


def kernel(x: int, *, y: int) -> tuple[int, int, list[int]]:
    """Its result says under which devices it ran."""
    return x, y, list(seen)


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the first is the current one."""

    @contextmanager
    def device(index: int) -> Iterator[None]:
        seen.append(index)
        try:
            yield
        finally:
            seen.remove(index)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(ops, "_triton_twin", lambda name: kernel)


def test_a_kernel_runs_on_the_device_of_its_operands() -> None:
    guarded = ops.pick(operation, None, torch.device("cuda:1"))
    assert guarded is not kernel and guarded(2, y=3) == (2, 3, [1])
    assert seen == []
    assert ops.pick(operation, None, torch.device("cuda:1")) is guarded


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_the_current_device_needs_no_guard(device: str) -> None:
    assert ops.pick(operation, "triton", torch.device(device)) is kernel


def test_nobody_asks_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors are on a GPU that no machine has to have."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    assert ops.pick(operation, None, torch.device("cuda:1")) is kernel


def test_an_error_of_the_kernel_reaches_the_caller() -> None:
    with pytest.raises(TypeError):
        ops.pick(operation, None, torch.device("cuda:1"))(2)  # type: ignore[call-arg]
    assert seen == []


@pytest.mark.parametrize(("backend", "device"), [("eager", "cuda:1"), (None, "cpu"), (None, "meta")])
def test_the_eager_operation_is_never_wrapped(backend: str | None, device: str) -> None:
    assert ops.pick(operation, backend, torch.device(device)) is operation
