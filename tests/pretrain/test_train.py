"""The whole script on a model of 14 thousand parameters."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llama
from lowrank_optim.pretrain import checkpoint, report, steps
from lowrank_optim.pretrain.metrics import read_metrics
from tests.pretrain.logs import rows

ROOT = Path(__file__).parents[2]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, shards: Path) -> Path:
    """The run of ``arguments``, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        line = arguments_of(tiny_model, shards)
        assert train_llama.main([*line, "--output-dir", str(out)]) == 0
    return out


def arguments_of(tiny_model: Path, shards: Path) -> list[str]:
    return (
        f"--model {tiny_model} --dataset {shards} --no-pack --optimizer-args rank=4 update_proj_gap=3 --lr 0.02"
        " --seq-len 24 --batch-size 5 --accumulate 2 --max-steps 8 --save-every 3 --keep 0 --eval-every 4"
        " --sample-tokens 4"
    ).split()


@pytest.fixture
def arguments(tiny_model: Path, shards: Path) -> list[str]:
    """Eight updates that see every shard more than once."""
    return arguments_of(tiny_model, shards)


def test_run_folder(unbroken: Path) -> None:
    logged = rows(unbroken)
    training = [row for row in logged if "loss" in row]
    evaluations = [row for row in logged if "eval_loss" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    energy = {key: value for key, value in training[0].items() if key.startswith("energy/")}
    assert set(training[0]) == {"step", "loss", "lr", "grad_norm", "epoch", *energy}
    assert len(energy) == 14 and all(0 < value <= 1.000001 for value in energy.values())
    assert set(evaluations[0]) == {"step", "eval_loss", "perplexity"}
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"]
    # Warm-up of 10 % of 8 updates is none: a cosine from the first update on.
    assert training[-1]["lr"] == pytest.approx(0.002)
    assert [p.name for p in checkpoint.checkpoints(unbroken)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert "rank=4" in (unbroken / "config.yaml").read_text()


def test_transformers_loads_the_export(unbroken: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(unbroken / "checkpoint-8")
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "checkpoint-8")
    ids = tokenizer("the small dog", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], 320)
    saved = torch.load(unbroken / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert set(saved) == {"optimizer", "schedule", "restarts", "in_backward"}


def test_two_resumes_end_bit_identical(unbroken: Path, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(unbroken / "checkpoint-3", out / "checkpoint-3")
    # What a killed run leaves: rows beyond its checkpoint, the last one torn.
    text = (unbroken / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[: text.index('"step": 6') + 20])
    line = [*arguments, "--output-dir", str(out), "--resume", "auto"]
    assert train_llama.main(line) == 0
    assert rows(out) == rows(unbroken)
    shutil.rmtree(out / "checkpoint-8")
    assert train_llama.main(line) == 0
    assert rows(out) == rows(unbroken)
    assert weights(out / "checkpoint-8") == weights(unbroken / "checkpoint-8")
    before = (out / "metrics.jsonl").read_bytes()
    assert train_llama.main(line) == 0
    assert (out / "metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_the_run_continues(
    unbroken: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = report.Meter.update

    def stop_at_two(self: report.Meter, step: int, tokens: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, step, tokens)

    line = [*arguments, "--output-dir", str(tmp_path), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(report.Meter, "update", stop_at_two)
        assert train_llama.main(line) == 128 + signal.SIGTERM
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert train_llama.main(line) == 0
    assert rows(tmp_path) == rows(unbroken)


@pytest.mark.slow
def test_sigkill_and_resume(unbroken: Path, arguments: list[str], tmp_path: Path) -> None:
    line = [*arguments, "--output-dir", str(tmp_path), "--resume", "auto"]
    code = "import sys, torch, train_llama; torch.set_num_threads(1); sys.exit(train_llama.main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", code, *line], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.checkpoints(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert checkpoint.checkpoints(tmp_path)
    assert not (tmp_path / "checkpoint-8").exists(), "the run ended before it was killed"
    assert train_llama.main(line) == 0
    assert rows(tmp_path) == rows(unbroken)
    assert weights(tmp_path / "checkpoint-8") == weights(unbroken / "checkpoint-8")


def test_accumulation_is_exact(arguments: list[str], unbroken: Path, tmp_path: Path) -> None:
    # Ten sequences at once: the same tokens an update, so the same losses but for the order of additions.
    other = [*arguments, "--batch-size", "10", "--accumulate", "1", "--max-steps", "8", "--output-dir", str(tmp_path)]
    assert train_llama.main(other) == 0
    for one, two in zip(rows(tmp_path), rows(unbroken), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    losses = [next(row["loss"] for row in rows(path) if "loss" in row) for path in (tmp_path, unbroken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "4"], "batch_size was 5 and is now 4"),
        (["--accumulate", "1"], "accumulate was 2 and is now 1"),
        (["--seq-len", "16"], "seq_len was 24 and is now 16"),
        (["--optimizer", "AdamW", "--optimizer-args"], "optimizer was 'GaLoreAdamW'"),
        (["--lr", "0.1"], "lr was 0.02 and is now 0.1"),
        (["--pack"], "pack was False and is now True"),
        (["--dataset", "stdlib"], "dataset was"),
    ],
)
def test_a_changed_run_is_not_resumed(
    unbroken: Path, arguments: list[str], tmp_path: Path, capfd: Any, change: list[str], message: str
) -> None:
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")
    line = [*arguments, *change, "--output-dir", str(tmp_path), "--resume", "auto"]
    assert train_llama.main(line) == 2
    assert message in capfd.readouterr().err


def test_nothing_saved_is_overwritten(unbroken: Path, arguments: list[str], capfd: Any) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*"))
    assert train_llama.main([*arguments, "--output-dir", str(unbroken)]) == 2
    assert "holds a run already" in capfd.readouterr().err
    older = ["--output-dir", str(unbroken), "--resume", str(unbroken / "checkpoint-3")]
    assert train_llama.main([*arguments, *older]) == 2
    assert "is newer than" in capfd.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*")) == before


def test_a_full_disk_keeps_the_last_checkpoint(
    unbroken: Path, arguments: list[str], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = [*arguments, "--output-dir", str(tmp_path), "--resume", "auto", "--keep", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        assert train_llama.main(line) == 2
    error = capfd.readouterr().err
    assert re.search(r"Cannot save .*checkpoint-6: .*No space left.*checkpoint-3 is intact", error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "config.yaml", "metrics.jsonl"]
    assert train_llama.main(line) == 0
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-8"]
    assert weights(tmp_path / "checkpoint-8") == weights(unbroken / "checkpoint-8")


def test_a_broken_checkpoint(unbroken: Path, arguments: list[str], tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"torn")
    assert train_llama.main([*arguments, "--output-dir", str(tmp_path), "--resume", "auto"]) == 2
    assert "Broken checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "./missing"], "./missing does not exist"),
        (["--optimizer", "GaloreAdamW"], "did you mean GaLoreAdamW"),
        (["--optimizer-args", "rnk=3"], "rnk"),
        (["--optimizer-args", "rank=0"], "rank: 0"),
        (["--model", "llama_60b"], "did you mean llama_60m"),
        (["--seq-len", "65"], "Invalid seq_len: 65, expected at most 64"),
        (["--resume", "./missing"], "is no checkpoint"),
        (["--output-dir", "/dev/null/run"], "/dev/null/run"),
        (["--warmup-steps", "9"], "Invalid warmup_steps: 9"),
        (["--tokenizer", "./missing"], "Cannot load tokenizer './missing'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capfd: Any, change: list[str], message: str
) -> None:
    assert train_llama.main([*arguments, "--output-dir", str(tmp_path / "run"), *change]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_losses_that_are_not_finite(
    arguments: list[str], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = steps.clip_gradients_, iter(range(10**6))

    def sometimes_nan(parameters: Any, largest: float) -> torch.Tensor:
        norm = clip(parameters, largest)
        return norm * float("nan") if next(calls) in bad else norm

    monkeypatch.setattr(steps, "clip_gradients_", sometimes_nan)
    bad = {2, 3}
    assert train_llama.main([*arguments, "--output-dir", str(tmp_path / "a")]) == 0
    logged = [row for row in rows(tmp_path / "a") if "loss" in row]
    assert [row["step"] for row in logged if row["grad_norm"] is None] == [3, 4]
    bad = set(range(10**6))
    assert train_llama.main([*arguments, "--max-steps", "20", "--output-dir", str(tmp_path / "b")]) == 2
    assert "10 updates in a row" in capfd.readouterr().err


def test_dry_run_writes_nothing(arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_llama.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +16 x 16 +2 +rank 4", out)
    assert re.search(r"lm_head\.weight +320 x 16 +1 +full-rank", out)
    assert "= 240 tokens" in out
    assert re.search(r"AdamW, same model +float32 +0\.1", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.__version__ < "2.11", reason="--fsdp wants torch 2.11")
def test_a_dry_run_of_a_split_model_counts_the_part_of_a_process_and_speaks_once(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    line = ["--model", "llama_9m", "--seq-len", "32", "--output-dir", str(tmp_path / "run"), "--fsdp", "--dry-run"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train_llama.main(line) == 0
    out = capsys.readouterr().out
    # 8,995,968 fp32 values over four.
    assert re.search(r"AdamW, same model +float32 +8\.6 +8\.6 +17\.2 +34\.3", out)
    assert re.search(r"GaLoreAdamW +float32 +8\.6 +8\.6 +1", out) and "one of 4 processes" in out
    monkeypatch.setenv("RANK", "1")
    assert train_llama.main(line) == 0
    assert not capsys.readouterr().out


def test_predicted_memory_is_measured(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    line = [*arguments, "--max-steps", "1", "--dtype", "bf16", "--output-dir", str(tmp_path)]
    assert train_llama.main([*line, "--dry-run"]) == 0
    predicted = re.search(r"^GaLoreAdamW +(float32.*)$", capsys.readouterr().out, re.MULTILINE)
    assert train_llama.main(line) == 0
    measured = re.search(r"^GaLoreAdamW, measured +(float32.*)$", capsys.readouterr().out, re.MULTILINE)
    assert predicted and measured and predicted[1] == measured[1]


@pytest.mark.slow
def test_two_processes(arguments: list[str], unbroken: Path, tmp_path: Path) -> None:
    """Half the accumulation on two processes: the same documents in every update."""
    line = [*arguments, "--accumulate", "1", "--output-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    # `accelerate launch --cpu --num_processes 2` starts one process.
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    script = [sys.executable, *command, str(ROOT / "train_llama.py"), *line]
    subprocess.run(script, env=environment, check=True, timeout=300)
    mine, other = rows(tmp_path), rows(unbroken)
    assert json.loads((tmp_path / "checkpoint-8" / "state.json").read_text())["processes"] == 2
    assert mine[:2] == [pytest.approx(row, rel=1e-5) for row in other[:2]]
    assert mine == [pytest.approx(row, rel=1e-3) for row in other]
    # Both go on from the checkpoint that the first finds whole, and end as they did.
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"torn")
    subprocess.run([*script, "--resume", "auto"], env=environment, check=True, timeout=300)
    assert rows(tmp_path) == mine
    assert (tmp_path / "checkpoint-8.broken").is_dir()


@pytest.mark.slow
def test_sigkill_at_random_moments(arguments: list[str], tmp_path: Path) -> None:
    line = [*arguments, "--max-steps", "120", "--save-every", "7", "--keep", "2", "--eval-every", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    script = [sys.executable, str(ROOT / "train_llama.py"), *line, "--resume", "auto", "--output-dir"]
    subprocess.run([*script, str(tmp_path / "whole")], env=environment, check=True, timeout=300)
    broken = tmp_path / "broken"
    kills = 0
    for extra in (0.0, 0.13, 0.31, 0.57):
        process = subprocess.Popen([*script, str(broken)], env=environment)
        known = len(read_metrics(broken / "metrics.jsonl")) if broken.exists() else 0
        while process.poll() is None:
            time.sleep(0.01)
            path = broken / "metrics.jsonl"
            if path.exists() and len(read_metrics(path)) > known + 9:
                time.sleep(extra)
                break
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills > 1
    subprocess.run([*script, str(broken)], env=environment, check=True, timeout=300)
    assert rows(broken) == rows(tmp_path / "whole")
    assert weights(broken / "checkpoint-120") == weights(tmp_path / "whole" / "checkpoint-120")
    assert json.loads((broken / "checkpoint-120" / "state.json").read_text())["progress"]["step"] == 120
