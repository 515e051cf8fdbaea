"""Lines and files that nobody means: status 0 or 2, at most one line of error, never a traceback."""

from __future__ import annotations

import contextlib
import io
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_llama
from lowrank_optim.memory import cli
from lowrank_optim.pretrain.command_line import FIELDS

MODEL = str(Path(__file__).parents[1] / "golden" / "checkpoints" / "model.json")
WORDS = st.sampled_from(
    [
        *(
            "",
            "-",
            "--",
            "=",
            "=3",
            "rank=",
            "rank=-1",
            "rank=2",
            "rank=None",
            "rank=1e9",
            "rank=[1",
            "betas=(0.9,)",
            "x" * 300,
        ),
        *(
            "nan",
            "inf",
            "-inf",
            "-1",
            "0",
            "1",
            "2",
            "3.5",
            "1e-3",
            "1e400",
            "999999999999999999999",
            "None",
            "True",
            "ä\0",
        ),
        *(
            "AdamW",
            "GaLoreAdamW",
            "FiraAdamW",
            "Trion",
            "SGD",
            "Adafactor",
            "auto",
            "int8",
            "bf16",
            "fp32",
            "sltrain",
            "loro",
        ),
        *(
            "llama_tiny",
            "llama_9m",
            MODEL,
            "every=2",
            "proj_type=full",
            "targets=mlp",
            "lr=1",
            "sparsity=2",
            "/dev/null",
            ".",
        ),
        *("stdlib", "c4", "./no", "24GB", "1e9", "merge", "reset", "refactorize", "fp8", "wandb"),
    ]
)
TEXT = st.one_of(WORDS, st.text(string.printable, max_size=12))
# Without files, services and the time that the larger ones take.
NAMES = sorted(set(FIELDS) - {"config", "output_dir", "resume", "report_to", "dry_run", "compile", "model"})
FLAGS = st.sampled_from(["--" + name.replace("_", "-") for name in NAMES])
LINES = st.lists(st.tuples(FLAGS, st.lists(TEXT, max_size=3)), max_size=5)
YAML = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["[" * 3000, "{" * 3000, "a: &a [*a]", "lr: 2026-99-99", "- 1", "lr: !!int x", "? [1]\n: 2", "\0", "seed: 1_0"]
    ),
    st.dictionaries(st.sampled_from(NAMES), TEXT, max_size=4).map(
        lambda d: "\n".join(f"{k}: {v}" for k, v in d.items())
    ),
)
COMMANDS = st.sampled_from(["estimate", "simulate", "plan", "compare", "papers", "estimat", ""])
MEMORY_FLAGS = (
    "--optimizer --optimizer-args --parameterization --parameterization-args --weights --dtype --seq-len --batch-size"
    " --json --only --vram --gpu-memory --model"
)
MEMORY = st.lists(st.tuples(st.sampled_from(MEMORY_FLAGS.split()), st.lists(TEXT, max_size=2)), max_size=4)


def examples(number: int) -> Any:
    checks = list(HealthCheck)
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=checks, database=None)


def one_line(main: Callable[[list[str]], int], line: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main(line)
    errors = [text for text in err.getvalue().splitlines() if "error:" in text or "Invalid" in text]
    assert status in (0, 2), (line, status)
    assert len(errors) <= 1 and (status == 0 or err.getvalue().strip()), (line, err.getvalue())


def train(line: list[tuple[str, list[str]]]) -> None:
    words = [word for flag, values in line for word in (flag, *values)]
    one_line(train_llama.main, ["--model", MODEL, *words, "--dry-run"])


def config(text: str, folder: Path) -> None:
    (folder / "run.yaml").write_text(text, encoding="utf-8", errors="replace")
    one_line(train_llama.main, ["--model", MODEL, "--config", str(folder / "run.yaml"), "--dry-run"])


def memory(command: str, line: list[tuple[str, list[str]]]) -> None:
    words = [word for flag, values in line for word in (flag, *values)]
    one_line(cli.main, [command, "--model", MODEL, *words])


@pytest.mark.parametrize("number", [4, pytest.param(400, marks=pytest.mark.slow)])
def test_options(number: int) -> None:
    examples(number)(given(LINES)(train))()


@pytest.mark.parametrize("number", [5, pytest.param(800, marks=pytest.mark.slow)])
def test_yaml(number: int, tmp_path: Path) -> None:
    examples(number)(given(YAML)(lambda text: config(text, tmp_path)))()


@pytest.mark.parametrize("number", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_memory(number: int) -> None:
    examples(number)(given(COMMANDS, MEMORY)(memory))()


@pytest.mark.parametrize(
    "line",
    [
        ["--parameterization-args", "=3"],
        ["--optimizer-args", "="],
        ["--restart-args", "every"],
        ["--config", "/"],
        ["--resume", "\0"],
    ],
)
def test_lines_that_once_failed(line: list[str]) -> None:
    one_line(train_llama.main, ["--model", MODEL, *line, "--dry-run"])


def test_a_comparison_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--parameterization", "fp32"]) == 2
    assert "Invalid parameterization: 'fp32', expected one of" in capsys.readouterr().err
