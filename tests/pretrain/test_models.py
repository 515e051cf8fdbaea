"""Causal language models of transformers beside LLaMA: trained, resumed, and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_optim.cli.main import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.config import Options
from lowrank_optim.pretrain.data import Batch
from lowrank_optim.pretrain.llama import build_config, build_model, plain_head
from lowrank_optim.pretrain.sizes import tensor_bytes
from lowrank_optim.pretrain.steps import loss_sum

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama 3.2": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **GROUPED},
    "gemma 3": {"model_type": "gemma3_text", **GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "mistral": {"model_type": "mistral", **GROUPED},
    "phi": {"model_type": "phi", **SMALL},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 320, "n_positions": 64},
    "opt": {"model_type": "opt", **SMALL, "ffn_dim": 44, "word_embed_proj_dim": 16},
    "gpt-neox": {"model_type": "gpt_neox", **SMALL},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
FAST = {"llama 3.2", "gpt2"}
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MODELS]


def config_of(name: str, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(MODELS[name]))
    return path


def line_of(model: Path, shards: Path, out: Path) -> list[str]:
    common = "--optimizer-args rank=4 update_proj_gap=2 --lr 0.01 --seq-len 24 --batch-size 4 --max-steps 2"
    rest = "--save-every 1 --eval-batches 1 --sample-tokens 2 --checkpointing"
    return ["--model", str(model), "--dataset", str(shards), "--output-dir", str(out), *common.split(), *rest.split()]


@pytest.mark.parametrize("name", EACH)
def test_two_updates_a_resume_and_transformers(name: str, shards: Path, tmp_path: Path, capfd: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(name, tmp_path)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert main(line_of(config, shards, unbroken)) == 0, capfd.readouterr().err
    resumed.mkdir()
    shutil.copytree(unbroken / "checkpoint-1", resumed / "checkpoint-1")
    assert main([*line_of(config, shards, resumed), "--resume", "auto"]) == 0, capfd.readouterr().err
    weights = [(path / "checkpoint-2" / "model.safetensors").read_bytes() for path in (unbroken, resumed)]
    assert weights[0] == weights[1]
    assert weights[0] != (unbroken / "checkpoint-1" / "model.safetensors").read_bytes()
    model, report = AutoModelForCausalLM.from_pretrained(unbroken / "checkpoint-2", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(2, 320, (2, 24))
    batch = Batch(ids, ids)
    with torch.no_grad():
        whole = loss_sum(model, batch)
        assert torch.isfinite(whole)
        if plain_head(model):
            torch.testing.assert_close(loss_sum(model, batch, chunked=True), whole)
    # A head with a bias is the one that chunks do not know.
    assert plain_head(model) == (name != "phi")


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "AdamW"])
def test_every_byte_is_counted(name: str, optimizer: str, tmp_path: Path) -> None:
    config = str(config_of(name, tmp_path))
    args = {"rank": 4} if optimizer == "GaLoreAdamW" else {}
    job = Job(model=config, optimizer=optimizer, optimizer_args=args, seq_len=24)
    expected = estimate(job)
    _, _, model, built = build(job, "cpu")
    ids = torch.randint(2, 320, (2, 24))
    loss_sum(model, Batch(ids, ids)).backward()
    built.step()
    assert tensor_bytes(model, built)["optimizer"] == expected.optimizer_by_key
    counted = {kind: expected.by_category[kind] for kind in ("weights", "gradients")}
    assert counted == {kind: tensor_bytes(model, built)[kind] for kind in ("weights", "gradients")}  # type: ignore[literal-required]


@pytest.mark.parametrize("name", [EACH[0], *(pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][1:])])
def test_per_layer_int8_and_factors_work_or_are_refused(name: str, shards: Path, tmp_path: Path, capfd: Any) -> None:
    config = config_of(name, tmp_path)
    ways = {
        "per layer": ["--per-layer", "--accumulate", "2"],
        "int8": ["--weights", "int8", "--dtype", "bf16"],
        "factors": ["--parameterization", "lowrank", "--parameterization-args", "rank=4", "--optimizer-args"],
    }
    # Its linears are of a class of its own.
    refused = {"int8", "factors"} if name == "gpt2" else set()
    for way, more in ways.items():
        status = main([*line_of(config, shards, tmp_path / way), *more])
        error = capfd.readouterr().err
        assert (way, status) == (way, 2 if way in refused else 0), error
        if way in refused:
            assert "Conv1D" in error and "Traceback" not in error


def test_pretrained_weights_are_the_start(shards: Path, tmp_path: Path, capfd: Any) -> None:
    config = config_of("llama 3.2", tmp_path)
    assert main(line_of(config, shards, tmp_path / "first")) == 0
    start = tmp_path / "first" / "checkpoint-2"
    options = Options(init=str(start), dtype="bf16", seq_len=24, batch_size=4, optimizer_args=["rank=4"])
    assert options.model == options.tokenizer == str(start)
    _, _, model, _ = build(options, "cpu")
    saved = build_model(build_config(str(start)))
    from safetensors.torch import load_model

    load_model(saved, start / "model.safetensors")
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name
    more = ["--init", str(start), "--dataset", str(shards), "--seq-len", "24", "--batch-size", "4", "--max-steps", "1"]
    line = [*more, "--optimizer-args", "rank=4", "--sample-tokens", "0", "--output-dir", str(tmp_path / "second")]
    assert main([*line, "--weights", "int8", "--dtype", "bf16"]) == 0, capfd.readouterr().err
    assert main([*line, "--init", str(tmp_path / "nothing"), "--output-dir", str(tmp_path / "third")]) == 2
    assert "Invalid init" in capfd.readouterr().err


@pytest.mark.parametrize("fields", [{"model_type": "t5"}, {"model_type": "bert"}, {"model_type": "nope"}])
def test_what_is_no_causal_language_model_is_refused(fields: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="Invalid model"):
        build_config(str(tmp_path))
