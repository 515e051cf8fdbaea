"""CUDA graphs without CUDA: a call that is recorded stands for the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from lowrank_optim.optim.engine import LowRankOptimizer


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


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Nobody looks, as on a GPU, and a captured step is one that can be made again with the options it had.

    Returns:
        The graphs that are made from now on.
    """
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
    return Graph.made
