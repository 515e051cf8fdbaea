"""Runs whose updates happen in the backward pass, and the three jobs of lowrank_optim/configs/ on a tiny model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train_llama
from lowrank_optim.pretrain import checkpoint
from lowrank_optim.pretrain.batches import Batch
from lowrank_optim.pretrain.llama import build_config, build_model, checkpoint_activations_
from lowrank_optim.pretrain.steps import loss_sum
from tests.conformance import nightly
from tests.pretrain.logs import rows
from tests.pretrain.test_train import weights

ROOT = Path(__file__).parents[2]
METHODS = {
    "GaLoreAdamW": "rank=4 update_proj_gap=2",
    "QGaLoreAdamW8bit": "rank=4 update_proj_gap=2 queue_size=1",
    "DCTAdamW": "rank=4 update_proj_gap=2",
    "APOLLOMini": "update_proj_gap=2 state_dtype=int8",
}


@pytest.fixture
def line(tiny_model: Path, shards: Path) -> list[str]:
    return (
        f"--model {tiny_model} --dataset {shards} --lr 0.02 --seq-len 24 --batch-size 4 --accumulate 2 --max-steps 6"
        " --save-every 3 --keep 0 --eval-every 6 --eval-batches 2 --sample-tokens 0 --per-layer --grad-clip 0.5"
    ).split()


def run(line: list[str], folder: Path, *more: str) -> int:
    return train_llama.main([*line, "--output-dir", str(folder), *more])


def test_without_accumulation_and_clipping_it_is_the_ordinary_run(line: list[str], tmp_path: Path) -> None:
    line = [*line, "--accumulate", "1", "--grad-clip", "0", "--optimizer-args", *METHODS["GaLoreAdamW"].split()]
    assert run(line, tmp_path / "fused") == 0
    assert run(line, tmp_path / "plain", "--no-per-layer") == 0
    ours, theirs = (rows(tmp_path / name, energy=False) for name in ("fused", "plain"))
    assert weights(tmp_path / "fused" / "checkpoint-6") == weights(tmp_path / "plain" / "checkpoint-6")
    # Norms are summed in another order.
    assert [row.pop("grad_norm", 0.0) for row in ours] == pytest.approx([row.pop("grad_norm", 0.0) for row in theirs])
    assert ours == theirs


# A method with a basis, one without.
@pytest.mark.parametrize("name", ["GaLoreAdamW", "APOLLOMini", *nightly("QGaLoreAdamW8bit", "DCTAdamW")])
@pytest.mark.parametrize("weight", ["int8", *nightly("float", "int4")])
def test_a_resumed_run_ends_bit_identical(name: str, weight: str, line: list[str], tmp_path: Path) -> None:
    line = [*line, "--optimizer", name, "--optimizer-args", *METHODS[name].split()]
    # A refresh is in its second phase after the third update.
    line += ["--weights", weight] * (weight != "float")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(line, whole) == 0
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", broken)
    assert run(line, broken, "--resume", "auto") == 0
    assert rows(broken) == rows(whole)
    assert weights(broken / "checkpoint-6") == weights(whole / "checkpoint-6")
    training = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 7))
    assert all(row["grad_norm"] > 0 for row in training)
    # One schedule step an update: the cosine ends at a tenth.
    assert training[-1]["lr"] == pytest.approx(0.002)


def test_the_schedule_and_the_norm_are_those_of_the_ordinary_run(line: list[str], tmp_path: Path) -> None:
    line = [*line, "--optimizer-args", "rank=none", "--grad-clip", "0"]
    assert run(line, tmp_path / "fused") == 0
    assert run(line, tmp_path / "plain", "--no-per-layer") == 0
    for ours, theirs in zip(
        rows(tmp_path / "fused", energy=False), rows(tmp_path / "plain", energy=False), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("weight", "values"), [("int8", 255), ("int4", 15)])
def test_export_of_quantized_weights_loads_in_transformers(
    weight: str, values: int, line: list[str], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    assert run([*line, "--weights", weight, "--optimizer-args", "rank=4"], tmp_path) == 0
    evaluated = [row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row]
    assert evaluated[-1] < evaluated[0]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    row = model.model.layers[0].mlp.down_proj.weight[0]
    assert len(row.unique()) <= values
    assert row.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--optimizer", "AdamW"], "AdamW cannot update one parameter at a time"),
        (["--optimizer", "AdamW", "--no-per-layer", "--weights", "int8"], "expected an optimizer of lowrank_optim"),
        (["--weights", "bf16"], "expected 'int8', 'int4' or --dtype bf16"),
    ],
)
def test_what_does_not_go_together(
    change: list[str], message: str, line: list[str], tmp_path: Path, capfd: Any
) -> None:
    assert run(line, tmp_path, *change) == 2
    assert message in capfd.readouterr().err


def test_bfloat16_models_are_built_as_rounded_float32_models() -> None:
    config = build_config("llama_9m")
    torch.manual_seed(1)
    whole = build_model(config).state_dict()
    torch.manual_seed(1)
    model = build_model(config, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name].bfloat16()), name
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_checkpointed_layers_compute_the_same(tiny_model: Path) -> None:
    model = build_model(build_config(str(tiny_model))).train()
    ids = torch.randint(320, (2, 9))

    def gradients(chunked: bool) -> list[torch.Tensor]:
        model.zero_grad()
        loss_sum(model, Batch(ids, ids), chunked=chunked).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(False)
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    # Of two layers, those that are recomputed run twice.
    leaves_out = hasattr(model, "activation_checkpointing_enable")
    for every, number in ((1, 4), (2, 3)) if leaves_out else ((1, 4),):
        checkpoint_activations_(model, every=every)
        calls.clear()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, gradients(True), strict=True))
        assert len(calls) == number


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [24, 16, 12])
def test_jobs_on_a_tiny_model(gigabytes: int, tiny_model: Path, shards: Path, tmp_path: Path) -> None:
    config = ROOT / "lowrank_optim" / "configs" / f"llama_7b_{gigabytes}gb.yaml"
    assert train_llama.main(["--config", str(config), "--dry-run"]) == 0
    job = yaml.safe_load(config.read_text())
    tiny = {"model": str(tiny_model), "dataset": str(shards), "tokenizer": None, "seq_len": 24, "batch_size": 2}
    short = {"accumulate": 2, "max_steps": 4, "warmup_steps": 1, "eval_batches": 1, "save_every": 2, "sample_tokens": 0}
    args = {**job["optimizer_args"], "rank": 4, "update_proj_gap": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**job, **tiny, **short, "optimizer_args": args}))
    assert train_llama.main(["--config", str(tmp_path / "tiny.yaml"), "--output-dir", str(tmp_path / "run")]) == 0
    logged = rows(tmp_path / "run")
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert len(checkpoint.checkpoints(tmp_path / "run")) == 2
