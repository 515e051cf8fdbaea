"""When which bases are renewed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.optim.parts import View, Which
from lowrank_optim.optim.schedule import largest, refresh_due, scheduled, select_matrices

CPU = torch.device("cpu")
FOLLOWS: Any = SimpleNamespace(follows_gradient=True)
DRAWN: Any = SimpleNamespace(follows_gradient=False)


def due_steps(group: dict[str, Any], place: int = 0, **state: Any) -> list[int]:
    return [step for step in range(12) if scheduled({"step": step, "waiting": 0, **state}, group, place)]


def test_steps_that_renew() -> None:
    group = {"update_proj_gap": 5, "stagger": False}
    assert due_steps(group) == due_steps(group, 7) == [0, 5, 10]
    # A lazy subspace keeps a gap of its own.
    assert due_steps(group, gap=4) == [0, 4, 8]
    staggered = {**group, "stagger": True}
    assert due_steps(staggered) == [0, 5, 10] and due_steps(staggered, 1) == [0, 2, 7]
    assert due_steps({"update_proj_gap": 1, "stagger": True}, 3) == [*range(12)]


def test_a_matrix_that_waits_is_due_in_every_step() -> None:
    group = {"update_proj_gap": 5, "stagger": False}
    assert [step for step in range(7) if refresh_due({"step": step, "waiting": 0}, group, 0)] == [0, 5]
    assert [step for step in range(7) if refresh_due({"step": step, "waiting": 4}, group, 0)] == [*range(7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_largest_magnitudes(dtype: torch.dtype) -> None:
    grad = torch.zeros(2, 3, 4, dtype=dtype)
    grad[0, 1, 2], grad[1, 0, 0] = 2, -3
    assert largest(grad, (2,)).tolist() == [2, 3] and largest(grad[1], ()).tolist() == [3]
    if dtype.is_complex:
        grad[0, 0, 0] = -5j
        assert largest(grad, (2,)).tolist() == [5, 3] and largest(grad[0], ()).tolist() == [5]
    grad[0, 0, 1] = torch.nan
    sizes = largest(grad, (2,))
    assert sizes[0] != sizes[0] and sizes[1] == 3 and not largest(grad[0], ())[0] < float("inf")


def as_list(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("step", "waiting", "sizes", "is_scheduled", "usable", "warm", "left"),
    [
        # The first: those with a gradient, the others wait.
        (0, 0, [1.0, 2.0, 3.0], True, None, False, 0),
        (0, 0, [1.0, 0.0, 3.0], True, [True, False, True], False, 0b010),
        (0, 0, [0.0, 0.0, 0.0], True, "none", None, 0b111),
        # Those that wait take the first gradient that they get; the others stay.
        (2, 0b010, [1.0, 0.0, 3.0], False, "none", None, 0b010),
        (2, 0b110, [1.0, 4.0, 0.0], False, [False, True, False], [True, False, False], 0b100),
        (2, 0b111, [1.0, 4.0, 2.0], False, None, False, 0),
        # A scheduled one: of those with a basis only some have a gradient.
        (5, 0, [1.0, 2.0, 3.0], True, None, True, 0),
        (5, 0, [1.0, 0.0, 3.0], True, [True, False, True], True, 0),
        (5, 0, [0.0, 0.0, 0.0], True, "none", None, 0),
        (5, 0b010, [1.0, 2.0, 3.0], True, None, [True, False, True], 0),
        (5, 0b010, [1.0, 0.0, 0.0], True, [True, False, False], [True, False, True], 0b010),
    ],
)
def test_which_matrices_are_renewed(
    step: int, waiting: int, sizes: list[float], is_scheduled: bool, usable: Any, warm: Any, left: int
) -> None:
    view = View((3, 8, 6), torch.float32, CPU, "stack")
    state = {"step": step, "waiting": waiting}
    which, still = select_matrices(FOLLOWS, sizes, view, state, CPU, is_scheduled)
    assert still == left
    if usable == "none":
        assert which is None
    else:
        assert which is not None and as_list(which.usable) == usable and as_list(which.warm) == warm
        assert not isinstance(which.usable, torch.Tensor) or which.usable.shape == (3, 1, 1)
    # What is drawn needs no gradient.
    assert select_matrices(DRAWN, sizes, view, state, CPU, is_scheduled) == (Which(warm=step > 0), 0)


def test_all_refreshes_of_a_step_read_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not look; and a basis that did not come out starts anew at the next refresh."""
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    params = [nn.Parameter(torch.zeros(12, 8)) for _ in range(3)]
    optimizer = GaLoreAdamW(params, rank=3, update_proj_gap=2)
    reads = []

    def step(*grads: Tensor) -> int:
        for p, grad in zip(params, grads):
            p.grad = grad
        reads.clear()
        optimizer.step()
        return len(reads)

    step(*torch.randn(3, 12, 8))
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        found = getattr(Tensor, name)

        def counted(self: Tensor, found: Any = found) -> Any:
            reads.append(found)
            return found(self)

        monkeypatch.setattr(Tensor, name, counted)
    assert step(*torch.randn(3, 12, 8)) == 0
    # Of rank 1, where three directions are wanted.
    flat = torch.ones(12, 8)
    assert step(flat, *torch.randn(2, 12, 8)) == 1
    assert step(*torch.randn(3, 12, 8)) == 0
    with pytest.warns(RuntimeWarning, match="kept an old basis"):
        assert step(*torch.randn(3, 12, 8)) > 1
    assert step(*torch.randn(3, 12, 8)) == 0
    assert step(*torch.randn(3, 12, 8)) == 1
    basis = optimizer.state[params[0]]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3))
