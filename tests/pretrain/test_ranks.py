"""``--ranks``: made from the gradients of the first update, taken by optimizers, layers and the memory command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain import ranks
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.config import Options


def made(tiny_model: Path, shards: Path, out: Path, *more: str) -> int:
    line = f"--model {tiny_model} --dataset {shards} --seq-len 24 --batch-size 5 --rank-budget 4 --out {out}"
    return ranks.main([*line.split(), *more])


def test_ranks_go_from_gradients_to_runs(tiny_model: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    assert made(tiny_model, shards, out) == 0
    found: dict[str, int] = json.loads(out.read_text())
    assert len(found) == 14 and len(set(found.values())) > 1
    sizes = {name: 32 if "attn" in name else 60 for name in found}
    uniform = 4 * sum(sizes.values())
    assert uniform - 60 < sum(rank * sizes[name] for name, rank in found.items()) <= uniform
    made_again = tmp_path / "again.json"
    assert made(tiny_model, shards, made_again) == 0 and json.loads(made_again.read_text()) == found

    options: dict[str, Any] = {"model": str(tiny_model), "ranks": str(out), "batch_size": 1, "seq_len": 24}
    _, _, _, optimizer = build(Options(optimizer="GaLoreAdamW", **options), "meta")
    compressed = {
        name: group["rank"]
        for group in optimizer.param_groups
        if group["rank"] is not None
        for name in group["param_names"]
    }
    assert compressed == found
    _, _, model, _ = build(Options(parameterization="lowrank", **options), "meta")
    layers = {f"{name}.weight": len(layer.A) for name, layer in model.named_modules() if hasattr(layer, "A")}
    assert layers == found
    factors = estimate(Job(optimizer="AdamW", parameterization="lowrank", **options))
    assert factors.parameters == 2 * 320 * 16 + 5 * 16 + sum(rank * sizes[name] for name, rank in found.items())


def test_mistakes_are_one_line(tiny_model: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "ranks.json"
    for more, message in [
        (["--rank-budget", "0"], "Invalid budget: 0"),
        (["--optimzer", "AdamW"], "did you mean --optimizer?"),
        (["--weights", "int8"], "leave --parameterization, --weights and --ranks to the run"),
        (["--dataset", str(tmp_path / "none")], "error:"),
        (["--out", str(tmp_path / "no" / "folder")], "No such file"),
    ]:
        assert made(tiny_model, shards, out, *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not out.exists()
    options: dict[str, Any] = {"model": str(tiny_model), "ranks": str(out), "batch_size": 1, "seq_len": 24}
    for text, message in [(None, "cannot read"), ("{", "cannot read"), ('{"a": "b"}', "is not a mapping from names")]:
        if text is not None:
            out.write_text(text)
        with pytest.raises(ValueError, match=f"Invalid ranks: .*{message}"):
            build(Options(optimizer="GaLoreAdamW", **options), "meta")
