"""Runs that replay the optimizer's step; a recorded call stands for the graph."""

from __future__ import annotations

from pathlib import Path

import pytest

import train_llama
from tests.graphs import recorded
from tests.pretrain.logs import rows
from tests.pretrain.test_train import weights


@pytest.fixture
def line(tiny_model: Path, shards: Path) -> list[str]:
    return (
        f"--model {tiny_model} --dataset {shards} --lr 0.02 --seq-len 24 --batch-size 4 --accumulate 2 --max-steps 8"
        " --save-every 4 --keep 0 --eval-every 8 --eval-batches 2 --sample-tokens 0 --grad-clip 0.5"
        " --optimizer FiraAdamW --optimizer-args rank=4 update_proj_gap=5"
    ).split()


def test_the_run_is_the_same(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("plain", "replayed", "resumed")]
    plain, replayed, resumed = ([*line, "--output-dir", str(folder)] for folder in folders)
    graphs = recorded(monkeypatch)
    assert train_llama.main([*plain, "--optimizer-args", "rank=4", "update_proj_gap=5", "capturable=true"]) == 0
    assert not graphs
    for module in ("launch", "build"):
        monkeypatch.setattr(f"lowrank_optim.pretrain.{module}.is_gpu", lambda device: True)
    assert train_llama.main([*replayed, "--graph-step"]) == 0
    # Updates 1 and 6 refresh, and the second is the first that finds its gradients where they were.
    assert [graph.replays for graph in graphs] == [6]
    assert train_llama.main([*resumed, "--graph-step", "--resume", str(folders[1] / "checkpoint-4")]) == 0
    assert len(graphs) == 2 and graphs[1].replays == 2
    for folder in folders[1:]:
        assert weights(folder / "checkpoint-8") == weights(folders[0] / "checkpoint-8")
    assert rows(folders[1], energy=False) == rows(folders[0], energy=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "Invalid graph_step: True on cpu, expected a CUDA device"),
        ("--per-layer", "Invalid graph_step: True with per_layer=True"),
        ("--restarts reset", "Invalid graph_step: True with restarts='reset'"),
        ("--optimizer AdamW --optimizer-args", "Invalid graph_step: True with AdamW, expected an optimizer of"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    more: str,
    message: str,
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if more:
        monkeypatch.setattr("lowrank_optim.pretrain.launch.is_gpu", lambda device: True)
    assert train_llama.main([*line, "--graph-step", *more.split(), "--output-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
