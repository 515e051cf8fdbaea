"""A step that replays a CUDA graph makes the same updates; here a recorded call stands for the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.replay import ReplayedStep
from tests.conformance import noise
from tests.graphs import Graph, recorded
from tests.optimizers import OPTIMIZERS

SHAPES = [(12, 8), (8, 12), (2, 8, 10), (5,)]
METHODS = ["GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "QGaLoreAdamW8bit", "FRUGALAdamW"]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    return recorded(monkeypatch)


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
def test_the_same_updates(name: str, stagger: bool, graphs: list[Graph]) -> None:
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
    assert len(graphs) == 1
    if not stagger:
        assert graphs[0].replays == 9
    assert graphs[0].replays > 0


def test_moved_gradients_other_options_and_a_loaded_state_make_another_graph(graphs: list[Graph]) -> None:
    params, optimizer = made("GaLoreAdamW", update_proj_gap=100)
    step = ReplayedStep(optimizer)

    def graphs_after(steps: int) -> int:
        for i in range(steps):
            give(params, i)
            step()
        return len(graphs)

    assert graphs_after(3) == 1
    params[0].grad = torch.zeros_like(params[0])
    assert graphs_after(1) == 1
    assert graphs_after(1) == 2
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert graphs_after(2) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert graphs_after(1) == 3
    assert graphs_after(1) == 4


def test_a_rate_that_is_a_tensor_is_read_where_it_is(graphs: list[Graph]) -> None:
    rate = torch.tensor(0.1)
    params, optimizer = made("GaLoreAdamW", lr=rate)
    step = ReplayedStep(optimizer)
    for i in range(3):
        give(params, i)
        step()
    assert len(graphs) == 1 and step._rates == [None] and optimizer.param_groups[0]["lr"] is rate
    # Another tensor is one that the graph does not read.
    optimizer.param_groups[0]["lr"] = rate.clone()
    for i in range(2):
        give(params, i)
        step()
    assert len(graphs) == 2


def test_gradients_that_are_allocated_anew_are_never_captured(graphs: list[Graph]) -> None:
    params, optimizer = made("GaLoreAdamW")
    step = ReplayedStep(optimizer)
    kept = []
    for i in range(4):
        for p in params:
            kept.append(p.grad)
            p.grad = torch.zeros_like(p)
        give(params, i)
        step()
    assert not graphs
    assert int(optimizer.state[params[0]]["step"]) == 4


def test_only_what_is_capturable() -> None:
    params, optimizer = made("GaLoreAdamW", capturable=False)
    with pytest.raises(ValueError, match="Invalid capturable: False, expected True in every group"):
        ReplayedStep(optimizer)
    saved = optimizer.state_dict()
    params, optimizer = made("GaLoreAdamW")
    step = ReplayedStep(optimizer)
    optimizer.load_state_dict(saved)
    give(params, 0)
    with pytest.raises(ValueError, match="Invalid capturable: False, expected True in every group"):
        step()
