"""Faults in the data of a run: nothing computed is lost, and the run goes on once they are mended."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train_llama
from lowrank_optim.pretrain import checkpoint, readers
from lowrank_optim.pretrain import documents as documents_module
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.metrics import read_metrics
from lowrank_optim.pretrain.tokenization import train_bpe

from .conftest import documents

ROOT = Path(__file__).parents[2]
BAD = 70


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """120 documents in blocks of 10, of which a first look sees no more than the first."""
    monkeypatch.setattr(documents_module, "BLOCK", 10)
    monkeypatch.setattr(documents_module, "LOOK", 1)
    folder = tmp_path / "data"
    (folder / "validation").mkdir(parents=True)
    write(folder / "validation" / "a.jsonl", documents(5, 1))
    write(folder / "a.jsonl", documents(120, 0))
    return folder


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def break_line(path: Path, line: str = '{"text": "cut off') -> None:
    lines = path.read_text().splitlines()
    lines[BAD - 1] = line
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def train(tiny_model: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    """Twelve updates of ten documents each, one checkpoint at the end; further flags go behind."""

    def run(*more: Any) -> int:
        line = (
            f"--model {tiny_model} --dataset {data} --optimizer-args rank=4 update_proj_gap=3 --seq-len 24 --no-pack"
            " --batch-size 5 --accumulate 2 --max-steps 12 --save-every 0 --eval-every 0 --eval-batches 1"
            f" --sample-tokens 0 --max-bad-documents 0 --output-dir {tmp_path / 'run'} --resume auto"
        )
        return train_llama.main([*line.split(), *map(str, more)])

    return run


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def saved(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


def test_a_broken_line_stops_a_run_that_saves_and_goes_on_once_it_is_repaired(
    train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any
) -> None:
    train_bpe(documents(50, 0), 320).save_pretrained(tmp_path / "tokenizer")
    train = partial(train, "--tokenizer", tmp_path / "tokenizer")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train() == 0
    run.rename(whole)
    good = (data / "a.jsonl").read_bytes()
    break_line(data / "a.jsonl")
    assert train() == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert f"{data}/a.jsonl line {BAD} is no JSON" in error[0]
    assert "--max-bad-documents allows 0" in error[0]
    # Six updates had their documents.
    assert steps(run) == list(range(1, 7))
    assert saved(run) == ["checkpoint-6"]
    # Still broken: nothing new is lost, nothing is overwritten.
    assert train() == 2
    assert saved(run) == ["checkpoint-6"]
    (data / "a.jsonl").write_bytes(good)
    assert train() == 2
    assert "a.jsonl had" in capfd.readouterr().err
    assert train("--allow-changed-data") == 0
    assert "since the checkpoint: a.jsonl had" in capfd.readouterr().out
    assert losses(run) == losses(whole)
    weights = [(folder / "checkpoint-12" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


def test_a_broken_line_is_left_out_and_counted(
    train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any
) -> None:
    break_line(data / "a.jsonl", '{"text": ""}')
    assert train("--max-bad-documents", 1) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [f"warning: left out: {data}/a.jsonl line {BAD} is empty"]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    # Eleven updates and nine documents of the twelfth, then the text begins anew.
    assert [row["epoch"] for row in rows] == [0] * 11 + [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("append", "a.jsonl had"),
        ("edit", "a.jsonl has another content of the same size"),
        pytest.param("add", "b.jsonl is new", marks=pytest.mark.slow),
        pytest.param("remove", "b.jsonl is gone", marks=pytest.mark.slow),
    ],
)
def test_changed_data_goes_on_if_it_may(
    train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any, change: str, said: str
) -> None:
    if change == "remove":
        write(data / "b.jsonl", documents(20, 2))
    assert train("--max-steps", 6, "--warmup-steps", 1) == 0
    text = (data / "a.jsonl").read_text()
    if change == "append":
        (data / "a.jsonl").write_text(text + json.dumps({"text": "one more"}) + "\n")
    elif change == "edit":
        (data / "a.jsonl").write_text(text.replace("cat", "owl"))
    elif change == "add":
        write(data / "b.jsonl", documents(20, 2))
    else:
        (data / "b.jsonl").unlink()
    more = ("--max-steps", 9, "--warmup-steps", 1)
    assert train(*more) == 2
    error = capfd.readouterr().err
    assert f"the data is not what it was saved with ({said}" in error
    assert "Traceback" not in error
    assert saved(tmp_path / "run") == ["checkpoint-6"]
    assert train(*more, "--allow-changed-data") == 0
    assert said in capfd.readouterr().out
    assert steps(tmp_path / "run") == list(range(1, 10))
    # The tokenizer that was trained on the text as it was stays.
    tokenizers = [tmp_path / "run" / f"checkpoint-{step}" / "tokenizer.json" for step in (6, 9)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_what_was_held_out_stays_so_when_the_text_grows(
    train: Callable[..., int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(data / "validation")
    assert train("--max-steps", 1, "--warmup-steps", 1) == 0
    write(data / "b.jsonl", documents(200, 2))
    assert train("--max-steps", 2, "--warmup-steps", 1, "--allow-changed-data") == 0
    states = [checkpoint.read_fingerprint(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2)]
    assert states[0]["hold_out"] == states[1]["hold_out"]
    assert set(states[1]["files"]) == {"a.jsonl", "b.jsonl"}


@pytest.mark.parametrize(
    "fault", ["half of it", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gone", "folder"))]
)
def test_a_file_that_breaks_off(train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any, fault: str) -> None:
    lines = (data / "a.jsonl").read_bytes().splitlines(keepends=True)
    (data / "a.jsonl").write_bytes(b"".join(lines[:60]))
    packed = gzip.compress(b"".join(lines[60:]), mtime=0)
    (data / "b.json.gz").write_bytes(packed)
    assert train("--max-steps", 2, "--warmup-steps", 1) == 0
    (data / "b.json.gz").unlink()
    if fault == "half of it":
        (data / "b.json.gz").write_bytes(packed[: len(packed) // 2])
    elif fault == "folder":
        (data / "b.json.gz").mkdir()
    more = ("--max-steps", 14, "--warmup-steps", 1)
    assert train(*more) == 2
    wanted = "b.json.gz had" if fault == "half of it" else "b.json.gz is gone"
    assert wanted in capfd.readouterr().err
    assert train(*more, "--allow-changed-data") == (2 if fault == "half of it" else 0)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert fault != "half of it" or "b.json.gz breaks off after document" in error
    assert saved(tmp_path / "run")[-1] == f"checkpoint-{steps(tmp_path / 'run')[-1]}"
    assert train(*more, "--allow-changed-data", "--max-bad-documents", 1) == 0
    assert steps(tmp_path / "run") == list(range(1, 15))


def test_data_is_checked_before_the_model_is_built(
    train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_meta(options: Any, device: Any, **more: Any) -> Any:
        assert device == "meta", "the model was built"
        return build(options, device, **more)

    monkeypatch.setattr("lowrank_optim.pretrain.trainer.build", on_meta)
    (data / "a.jsonl").write_text(json.dumps({"content": "x"}) + "\n")
    assert train() == 2
    assert "line 1 has no 'text' string (its fields: content; --text-field names another)" in capfd.readouterr().err
    shutil.rmtree(data / "validation")
    write(data / "a.jsonl", ["one document"])
    assert train() == 2
    assert not (tmp_path / "run").exists()


FAULTS = [
    ("is no JSON", '{"text": "cut off'),
    ("is no object", "17"),
    ("has no 'text' string", '{"content": "x"}'),
    ("has a 'text' that is no string", '{"text": ["x"]}'),
    ("is empty", '{"text": " "}'),
    ("holds a NUL byte", '{"text": "a\\u0000b"}'),
    ("is no UTF-8 or holds a lone surrogate", '{"text": "\\ud800"}'),
    # Too deep for the parser, or at least never closed.
    ("is no JSON", "[" * 3900),
    ("is longer than", json.dumps({"text": "x" * 5000})),
]


def test_every_kind_of_fault_is_said_and_left_out(
    train: Callable[..., int], data: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST", 4000)
    monkeypatch.setattr(documents_module, "LOOK", 2**20)
    lines = (data / "a.jsonl").read_text().splitlines()
    for number, (_, line) in enumerate(FAULTS):
        lines.insert(10 * number, line)
    (data / "a.jsonl").write_text("\n".join(lines) + "\n")
    more = ("--max-steps", 2, "--warmup-steps", 1)
    assert train(*more, "--max-bad-documents", len(FAULTS) - 1) == 2
    assert not (tmp_path / "run").exists()
    capfd.readouterr()
    assert train(*more, "--max-bad-documents", len(FAULTS)) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    for number, ((why, _), warning) in enumerate(zip(FAULTS, warnings, strict=True)):
        assert warning.startswith(f"warning: left out: {data}/a.jsonl line {10 * number + 1} {why}")


@pytest.mark.slow
def test_two_processes_save_and_stop_at_the_same_fault(tiny_model: Path, tmp_path: Path) -> None:
    folder, run, whole = tmp_path / "data", tmp_path / "run", tmp_path / "whole"
    (folder / "validation").mkdir(parents=True)
    write(folder / "validation" / "a.jsonl", documents(5, 1))
    train_bpe(documents(50, 0), 320).save_pretrained(tmp_path / "tokenizer")
    write(folder / "a.jsonl", documents(700, 0))
    lines = (folder / "a.jsonl").read_text()
    line = (
        f"--model {tiny_model} --dataset {folder} --tokenizer {tmp_path / 'tokenizer'} --optimizer-args rank=4"
        " --seq-len 24 --no-pack --batch-size 64 --max-steps 9 --warmup-steps 1 --save-every 0 --eval-every 0"
        " --eval-batches 2 --sample-tokens 0 --max-bad-documents 0 --resume auto --allow-changed-data --output-dir"
    ).split()
    assert train_llama.main([*line, str(whole), "--accumulate", "2"]) == 0
    (folder / "a.jsonl").write_text(lines.replace(lines.splitlines()[600], "{"))
    script = (
        "import sys; from lowrank_optim.pretrain import documents; documents.LOOK = 1; import train_llama;"
        "sys.exit(train_llama.main(sys.argv[1:]))"
    )
    (tmp_path / "main.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    start = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29614",
        str(tmp_path / "main.py"),
    ]
    ended = subprocess.run(
        [sys.executable, *start, str(tmp_path / "main.py"), *line, str(run), "--accumulate", "1"],
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode
    assert ended.stderr.count("a.jsonl line 601 is no JSON") == 2
    # Four updates of 128 documents come from the first block of 512.
    assert saved(run) == ["checkpoint-4"]
    assert losses(run) == pytest.approx(losses(whole)[:4], rel=1e-4)
