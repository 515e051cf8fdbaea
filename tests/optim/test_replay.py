"""A step that replays a CUDA graph makes the same updates; here a recorded call stands for the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.replay import ReplayedStep
from tests.conformance import noise
from tests.optimizers import OPTIMIZERS

SHAPES = [(12, 8), (8, 12), (2, 8, 10), (5,)]
METHODS = ["GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "QGaLoreAdamW8bit", "FRUGALAdamW"]


class Graph:
    """What CUDA's does: a step that is recorded is not made; replayed it reads and writes where it did."""

    made: list[Graph]

    def __init__(self) -> None:
        self.step: Callable[[], None] = lambda: pytest.fail("nothing was recorded")
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.step()


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks, as on a GPU, and a captured step is one that can be made again with the options it had."""
    Graph.made = []
    inner = LowRankOptimizer._step_params
    recording: list[Graph] = []

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        recording.append(graph)
        yield
        recording.pop()

    def step(self: LowRankOptimizer) -> None:
        if not recording:
            inner(self)
            return
        rates = [group["lr"] for group in self.param_groups]

        def again() -> None:
            now = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate
            inner(self)
            for group, rate in zip(self.param_groups, now):
                group["lr"] = rate

        recording[-1].step = again

    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    monkeypatch.setattr(LowRankOptimizer, "_step_params", step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def made(name: str, **options: Any) -> tuple[list[nn.Parameter], LowRankOptimizer]:
    params = [nn.Parameter(draw) for draw in noise(SHAPES, 0)]
    for p in params:
        p.grad = torch.zeros_like(p)
    options = {"rank": 3, "lr": 0.1, "update_proj_gap": 5, "capturable": True, **options}
    return params, OPTIMIZERS[name](params, **options)


def give(params: list[nn.Parameter], step: int) -> None:
    for p, draw in zip(params, noise(SHAPES, step + 1)):
        assert p.grad is not None
        p.grad.copy_(draw)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stagger", [False, True])
def test_the_same_updates(name: str, stagger: bool) -> None:
    (params, optimizer), (others, reference) = (made(name, stagger=stagger, weight_decay=0.1) for _ in range(2))
    step = ReplayedStep(optimizer)
    for i in range(12):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.1 / (1 + i)
        give(params, i)
        give(others, i)
        step()
        reference.step()
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q)
    # Steps 1, 6 and 11 refresh, and the second is the first that finds its gradients where they were.
    assert len(Graph.made) == 1
    if not stagger:
        assert Graph.made[0].replays == 9
    assert Graph.made[0].replays > 0


def test_moved_gradients_other_options_and_a_loaded_state_make_another_graph() -> None:
    params, optimizer = made("GaLoreAdamW", update_proj_gap=100)
    step = ReplayedStep(optimizer)

    def graphs_after(steps: int) -> int:
        for i in range(steps):
            give(params, i)
            step()
        return len(Graph.made)

    assert graphs_after(3) == 1
    params[0].grad = torch.zeros_like(params[0])
    assert graphs_after(1) == 1
    assert graphs_after(1) == 2
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert graphs_after(2) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert graphs_after(1) == 3
    assert graphs_after(1) == 4


def test_gradients_that_are_allocated_anew_are_never_captured() -> None:
    params, optimizer = made("GaLoreAdamW")
    step = ReplayedStep(optimizer)
    kept = []
    for i in range(4):
        for p in params:
            kept.append(p.grad)
            p.grad = torch.zeros_like(p)
        give(params, i)
        step()
    assert not Graph.made
    assert int(optimizer.state[params[0]]["step"]) == 4


def test_only_what_is_capturable() -> None:
    _, optimizer = made("GaLoreAdamW", capturable=False)
    with pytest.raises(ValueError, match="Invalid capturable: False, expected True in every group"):
        ReplayedStep(optimizer)
