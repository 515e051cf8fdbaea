"""The benchmark of ``moments`` trains, and compares seed by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common, converge
from tests.pretrain.conftest import documents, write_shard


def test_gains_are_taken_within_a_seed() -> None:
    losses = {"keep": (3.0, 5.0), "align": (2.9, 4.9), "rotate": (3.1, 4.5)}
    runs = [
        {"refresh": "power", "moments": moments, "seed": seed, "validation_loss": loss}
        for moments, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    found = converge.gains(runs)["power"]
    assert found["align"]["mean"] == pytest.approx(0.1) and found["align"]["standard_error"] < 1e-6
    assert found["rotate"]["mean"] == pytest.approx(0.2)
    assert found["rotate"]["standard_error"] == pytest.approx(0.3)


def test_small_runs_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "tokenizers", "datasets"):
        pytest.importorskip(package)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "c4-train.00000-of-00001.json.gz", documents(60, 0))
    config = tmp_path / "small.json"
    fields = {"hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64, **fields}))
    line = f"--model {config} --dataset {tmp_path / 'shards'} --steps 5 --gap 2 --seeds 3 --refresh power --seq-len 16"
    converge.main([*line.split(), "--batch-size", "2", "--eval-batches", "1"])
    result = json.loads((tmp_path / "converge.json").read_text())
    assert [(one["moments"], one["seed"]) for one in result["runs"]] == [("keep", 3), ("align", 3), ("rotate", 3)]
    assert result["run"]["update_proj_gap"] == 2 and set(result["gain_over_keep"]["power"]) == {"align", "rotate"}
