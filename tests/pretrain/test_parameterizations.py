"""Parameterized models through the whole script, their recipes, and their restarts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llama
from lowrank_optim.nn import MergeAndRestart, MomentumReset, WeightRefactorization
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.llama import PRESETS
from lowrank_optim.pretrain.parameterizations import (
    PARAMETERIZATIONS,
    PUBLISHED,
    build_restarts,
    layer_spec,
    parameterize_,
)
from lowrank_optim.pretrain.recipes import resolve
from tests.conformance import nightly
from tests.nn.parameterizations import block
from tests.pretrain.logs import rows

# What the runs have beside the arguments of every run, and whether a dense weight comes out.
RUNS = {
    "sltrain": ("rank=4 sparsity=0.1", "", True),
    "lost": ("rank=4 sparsity=0.1", "", False),
    "sst": ("rank=4", "--optimizer-args update_proj_gap=2", True),
    "lowrank": ("rank=4", "--restarts refactorize --restart-args every=2 ramp=2", True),
    "cola": ("rank=4", "--restarts reset --restart-args every=2 ramp=2 first=4", False),
    "lora": ("rank=4 alpha=8 dropout=0.2", "", True),
    "relora": ("rank=4", "--restart-args every=2 ramp=2", True),
    "loro": ("rank=4", "--optimizer-args update_proj_gap=3 --restart-args every=3 ramp=2", True),
    "maestro": ("rank=4", "--restart-args every=2 lasso=0.01", True),
    "ternarylowrank": ("rank=4", "", True),
}


@pytest.fixture
def arguments(tiny_model: Path, shards: Path) -> list[str]:
    return (
        f"--model {tiny_model} --dataset {shards} --seq-len 24 --lr 0.02 --batch-size 5 --max-steps 6 --save-every 3"
        " --keep 0 --eval-every 0 --sample-tokens 0"
    ).split()


def test_the_runs_cover_every_parameterization() -> None:
    assert set(RUNS) == set(PARAMETERIZATIONS) == set(PUBLISHED)


# Of their kinds others run by default.
SLOW = ("lost", "lora", "ternarylowrank")


@pytest.mark.parametrize("name", [*(name for name in RUNS if name not in SLOW), *nightly(*SLOW)])
def test_a_run_resumes_to_the_last_bit_and_exports(name: str, arguments: list[str], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    pairs, more, dense = RUNS[name]
    line = [*arguments, "--parameterization", name, "--parameterization-args", *pairs.split(), *more.split()]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_llama.main([*line, "--output-dir", str(whole)]) == 0
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    assert train_llama.main([*line, "--output-dir", str(resumed), "--resume", "auto"]) == 0
    assert rows(resumed) == rows(whole)
    end = whole / "checkpoint-6"
    assert (resumed / "checkpoint-6" / "factored.safetensors").read_bytes() == (
        end / "factored.safetensors"
    ).read_bytes()
    losses = [row["eval_loss"] for row in rows(whole) if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert (end / "config.json").is_file()
    if dense:
        model = LlamaForCausalLM.from_pretrained(end)
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    else:
        # A loader that finds no weights says so; it must not find some that it fills at random.
        with pytest.raises(OSError, match=r"model\.safetensors"):
            LlamaForCausalLM.from_pretrained(end)


def test_the_export_computes_what_was_trained(arguments: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_model
    from transformers import LlamaForCausalLM

    line = [*arguments, "--parameterization", "sltrain", "--parameterization-args", "rank=4"]
    assert train_llama.main([*line, "--output-dir", str(tmp_path)]) == 0
    end = tmp_path / "checkpoint-6"
    exported = LlamaForCausalLM.from_pretrained(end)
    trained = LlamaForCausalLM(exported.config)
    parameterize_(trained, layer_spec("sltrain", {"rank": 4}), seed=5)
    load_model(trained, end / "factored.safetensors")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(exported(ids).logits, trained(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "pairs"), [("sltrain", "rank=4"), ("sst", "rank=4"), ("lora", "rank=4")])
def test_predicted_memory_is_measured(
    name: str, pairs: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*arguments, "--max-steps", "1", "--dtype", "bf16", "--output-dir", str(tmp_path)]
    line += ["--parameterization", name, "--parameterization-args", pairs]
    assert train_llama.main([*line, "--dry-run"]) == 0
    predicted = re.search(r"^(?:AdamW|SSTAdamW) +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert train_llama.main(line) == 0
    measured = re.search(r"^(?:AdamW|SSTAdamW), measured +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert predicted and measured and predicted[1] == measured[1]


def test_the_logged_rate_is_the_ramped_one(arguments: list[str], tmp_path: Path) -> None:
    line = [*arguments, "--parameterization", "relora", "--parameterization-args", "rank=4", "--warmup-steps", "2"]
    assert train_llama.main([*line, "--restart-args", "every=2", "ramp=2", "--output-dir", str(tmp_path)]) == 0
    rates = [row["lr"] for row in rows(tmp_path) if "loss" in row]
    # Restarts after updates 2, 4 and 6: a thousandth at 3 and 5.
    assert rates[:2] == pytest.approx([0.01, 0.02])
    assert rates[2] < 1e-3 * 0.02 and rates[4] < 1e-3 * 0.02
    assert rates[3] > 0.005


@pytest.mark.parametrize("name", ["loro", "sst"])
def test_updates_in_the_backward_pass_are_those_of_a_step(name: str, arguments: list[str], tmp_path: Path) -> None:
    pairs, more, _ = RUNS[name]
    line = [*arguments, "--parameterization", name, "--parameterization-args", *pairs.split(), *more.split()]
    assert train_llama.main([*line, "--output-dir", str(tmp_path / "step")]) == 0
    assert train_llama.main([*line, "--per-layer", "--output-dir", str(tmp_path / "backward")]) == 0
    # Restarts, their ramps and samples included; the norm is summed in another order.
    by_step, in_backward = (
        [{k: v for k, v in row.items() if k != "grad_norm"} for row in rows(tmp_path / folder, energy=False)]
        for folder in ("step", "backward")
    )
    assert in_backward == by_step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--parameterization", "sltrian"], "Invalid parameterization: 'sltrian'.*did you mean sltrain"),
        (["--parameterization", "sltrain", "--parameterization-args", "sparsty=0.1"], "did you mean sparsity"),
        (["--parameterization", "sltrain", "--parameterization-args", "rank=4", "sparsity=1"], "Invalid sparsity: 1"),
        (["--parameterization", "lost", "--parameterization-args", "rank=4", "gamma=1.5"], "Invalid gamma: 1.5"),
        (["--parameterization", "lowrank", "--parameterization-args", "rank=0"], "Invalid rank: 0"),
        (["--parameterization", "lowrank", "--parameterization-args", "rank=17"], "rank: 17, expected at most 16"),
        (["--parameterization", "lowrank", "--parameterization-args", "targets=experts"], "match no nn.Linear"),
        (
            ["--parameterization", "lowrank", "--parameterization-args", "targets=7"],
            "Invalid targets: 7, expected words",
        ),
        (["--optimizer-args", "targets=*_proj"], r"Invalid targets: '\*_proj', expected words or regular expressions"),
        (["--parameterization", "cola", "--parameterization-args", "rank=4", "hidden_act=silo"], "silo"),
        (["--parameterization", "cola", "--parameterization-args", "rank=4", "hidden_act=7"], "Invalid hidden_act: 7"),
        (["--seed", str(2**63)], r"Invalid seed: \d+, expected less than 2\^63"),
        (["--parameterization", "cola", "--parameterization-args", "rank"], "Invalid parameterization argument"),
        (["--optimizer", "LOROAdamW"], "no factors"),
        (["--optimizer", "SSTAdamW"], "no SST layer"),
        (["--restarts", "merge"], "no ReLoRALinear"),
        (["--restart-args", "every=3"], "Invalid argument without restarts: 'every'"),
        (["--restarts", "reset", "--restart-args", "evry=3"], "did you mean every"),
        (["--restarts", "reset", "--restart-args", "every=3"], "Invalid ramp: 10"),
    ],
)
def test_bad_input_is_one_line(
    change: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*arguments, "--output-dir", str(tmp_path / "run"), *change]
    assert train_llama.main(line) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.splitlines()[-1]), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def resolved(line: str, hidden_size: int = 512) -> Any:
    return resolve(parse_options(line.split()), hidden_size=hidden_size, processes=1)


def test_published_settings_of_sltrain() -> None:
    run = resolved("--model llama_1b --parameterization SLTrain", 2048)
    assert run.optimizer == "AdamW" and run.lr == 3e-3 and run.weight_decay == 0
    assert run.parameterization_args == ["rank=512", "sparsity=0.03", "alpha=8"]
    assert (run.warmup_steps, run.max_steps, run.restarts) == (10_000, 140_000, "none")
    # A run of another length has another warm-up; what is given stays.
    run = resolved("--model llama_1b --parameterization sltrain --max-steps 500 --parameterization-args rank=64", 2048)
    assert (run.warmup_steps, run.max_steps) == (50, 500)
    assert run.parameterization_args == ["rank=64", "sparsity=0.03", "alpha=8"]


def test_published_settings_of_the_others() -> None:
    cola = resolved("--model llama_350m --parameterization cola", 1024)
    assert (cola.lr, cola.weight_decay, cola.grad_clip, cola.warmup_steps) == (3e-3, 0.01, 0.5, 6000)
    assert cola.parameterization_args == ["rank=256", "hidden_act=linear"]
    loro = resolved("--model llama_130m --parameterization loro", 768)
    assert (loro.optimizer, loro.lr, loro.optimizer_args) == ("LOROAdamW", 0.01, ["update_proj_gap=500"])
    assert loro.restarts == "reset" and "every=500" in loro.restart_args and "ramp=5" in loro.restart_args
    sst = resolved("--model llama_60m --parameterization sst")
    assert (sst.optimizer, sst.parameterization_args) == ("SSTAdamW", ["rank=32"])
    relora = resolved("--model llama_60m --parameterization relora --restarts none")
    assert relora.restarts == "none" and relora.restart_args == []
    other = resolved("--model llama_60m --parameterization sltrain --optimizer GaLoreAdamW")
    assert other.lr == 0.01
    # A size without published settings: the rank grows with the width.
    wide = resolved("--model llama_3b --parameterization lowrank", 2560)
    assert "rank=640" in wide.parameterization_args and wide.max_steps == 10_000


def test_every_published_setting_builds() -> None:
    for name, sizes in PUBLISHED.items():
        for size, recipe in sizes.items():
            assert size in PRESETS
            spec = layer_spec(name, recipe.args)
            # Without one, all components that a layer has.
            assert (spec.options.rank or 0) < PRESETS[size].hidden  # type: ignore[attr-defined]


def test_kinds_of_restarts() -> None:
    model = block()
    parameterize_(model, layer_spec("relora", {"rank": 4}))
    optimizer = torch.optim.AdamW(model.parameters())
    kinds = {
        kind: [type(r) for r in build_restarts(kind, {}, model, optimizer, first=30, seed=0)]
        for kind in ("none", "reset", "refactorize", "merge")
    }
    assert kinds == {
        "none": [],
        "reset": [MomentumReset],
        "refactorize": [WeightRefactorization, MomentumReset],
        "merge": [MergeAndRestart],
    }
    both = build_restarts("refactorize", {"every": 50, "scope": "factors"}, model, optimizer, first=30, seed=0)
    assert [(r.every, r.first) for r in both] == [(50, 30), (50, 30)]
