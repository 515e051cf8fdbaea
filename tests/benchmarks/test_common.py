"""Timing, counting and bookkeeping of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common

CPU = torch.device("cpu")


def test_candidates_take_turns_and_the_budget_ends_them() -> None:
    order: list[str] = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "AB"}
    seconds = common.interleave(candidates, CPU, budget=0.0, least=3, warmup=1)
    assert "".join(order) == "AB" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}
    assert len(common.interleave(candidates, CPU, budget=60.0, least=1, most=2, warmup=0)["A"]) == 2


def test_ratio_is_taken_within_rounds() -> None:
    """The machine is three times slower in the second round; the ratio of medians would be 1."""
    assert common.ratio([2.0, 6.0, 2.0], [1.0, 3.0, 2.0]) == 2.0
    assert common.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p20": 1.0, "p80": 3.0, "n": 3}


def test_new_tensors_are_counted_but_not_views_and_what_is_written_in_place() -> None:
    a, out = torch.ones(6, 4), torch.empty(6, 4)
    with common.NewTensors(24) as created:
        a.add_(1).mT.mul_(2)
        a.reshape(-1)
        torch.add(a, a, out=out)
        a[:3] * 2
    assert created.count == 0
    with common.NewTensors(24) as created:
        _ = (a + 1) > 0
    assert created.count == 2


def test_held_bytes_sees_into_objects_and_counts_a_storage_once_and_whole() -> None:
    class Projector:
        def __init__(self, matrix: torch.Tensor) -> None:
            self.matrix = matrix
            self.itself = self

    whole, weight = torch.ones(10, 10), torch.ones(5)
    state = {"p": {"step": 1, "projector": Projector(whole[:2]), "again": [whole[3:]], "weight": weight}}
    assert common.held_bytes(state, exclude=[weight]) == 400


def test_a_result_says_where_and_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    assert common.read_result("trial") is None
    path = common.write_result("trial", CPU, {"figures": [1.5]})
    assert common.read_result("trial") == json.loads(path.read_text())
    result = common.read_result("trial")
    assert result is not None and result["figures"] == [1.5]
    assert result["machine"]["threads"] == 1 and torch.__version__.startswith(result["versions"]["torch"])
    assert result["command"].startswith("python ")
