"""Checkpoints of every release load for ever: see ``tests/golden/README.md`` for how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train_llama
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.metrics import read_metrics
from lowrank_optim.pretrain.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
RUNS: dict[str, list[str]] = json.loads((GOLDEN / "runs.json").read_text())
# One of every kind of state.
FAST = ("GaLoreAdamW8bit", "per_layer", "int8")
CASES = [
    pytest.param(path, id=f"{path.parent.name}-{path.name}", marks=[] if path.name in FAST else pytest.mark.slow)
    for path in sorted(GOLDEN.glob("[0-9]*/*"))
]


def line_of(name: str, out: Path) -> list[str]:
    common = (
        "--dataset data --no-pack --model model.json --seq-len 16 --batch-size 2 --save-every 0 --eval-every 0"
        " --eval-batches 1 --warmup-steps 0 --sample-tokens 0 --lr 0.01 --max-steps 5 --resume auto"
        # 0.1 read text in another order.
        " --allow-changed-data"
    )
    return [*common.split(), *RUNS[name], "--output-dir", str(out)]


def tensors(state: Any) -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {f"{key}.{rest}": value for key, inner in items for rest, value in tensors(inner).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_released_checkpoint_continues(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    shutil.copytree(case / "checkpoint-3", tmp_path / "checkpoint-3")
    line = line_of(case.name, tmp_path)

    trainer = Trainer(parse_options(line), tmp_path)
    weights = next((tmp_path / "checkpoint-3").glob("factored.*"), tmp_path / "checkpoint-3" / "model.safetensors")
    model = trainer.model.state_dict()
    for name, value in load_file(weights).items():
        assert torch.equal(model[name], value), name
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    loaded = tensors(trainer.optimizer.state_dict()["state"])
    assert tensors(saved)
    for name, value in tensors(saved).items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, equal_nan=True, msg=name)

    assert train_llama.main(line) == 0
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [4, 5]
    assert all(4 < row["loss"] < 8 for row in rows)
