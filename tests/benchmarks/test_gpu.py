"""The benchmark for a GPU without one: its pieces, what happens when they die, and the tables from its lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from benchmarks import table as readme
from benchmarks.baselines import own_names
from benchmarks.gpu import cases, check, limits, record, runner, sanitizer, table, throughput, train, worker
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from lowrank_optim.pretrain.llama import PRESETS

CPU = torch.device("cpu")


def lines(folder: Path, piece: str | None = None) -> list[dict[str, Any]]:
    return [row for row in record.read(folder / record.FILE) if piece in (None, row["piece"])]


def setting(folder: Path, **changed: Any) -> Setting:
    values = {"out": folder, "scratch": folder, "ends": time.time() + 60, "tokens": None, "updates": 3}
    return Setting(**{**values, "device": CPU, "device_name": "cpu", **changed})


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--only", "limits", "--budget", "900"]
    environment = {**runner.environment(), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    ends = time.time() + 300
    while len(lines(tmp_path)) < 3 and time.time() < ends:
        time.sleep(0.02)
    assert len(lines(tmp_path)) >= 3 and first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    # The process of the piece notices that it is alone.
    time.sleep(1.5)
    before = (tmp_path / record.FILE).read_text(encoding="utf-8").splitlines()
    time.sleep(0.5)
    assert (tmp_path / record.FILE).read_text(encoding="utf-8").splitlines() == before
    # What a kill can leave of a line.
    with (tmp_path / record.FILE).open("a", encoding="utf-8") as file:
        file.write('{"piece": "limits", "na')
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = (tmp_path / record.FILE).read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before
    rows = lines(tmp_path)
    assert [row["name"] for row in rows] == [*(task.name for task in limits.tasks(setting(tmp_path))), record.WHOLE]
    assert not [row for row in rows if "reason" in row], second.stdout
    assert all(row["device"] == "cpu" for row in rows)
    assert rows[0]["versions"]["torch"] and all(row["tb_s"] > 0 for row in rows if "tb_s" in row)
    monkeypatch.setattr(runner, "device_name", lambda: "cpu")
    runner.main(command[3:])
    assert "limits: done before" in capsys.readouterr().out
    assert (tmp_path / record.FILE).read_text(encoding="utf-8").splitlines() == after


def test_a_failure_costs_a_line_and_not_the_piece(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no such\n instruction")

    one = setting(tmp_path)
    tasks = [Task("first", lambda: {"ms": 1.0}), Task("second", broken), Task("third", lambda: {"ms": float("nan")})]
    assert worker.work(one, "kernels", tasks) == 0
    rows = lines(tmp_path, "kernels")
    assert [row["name"] for row in rows] == ["first", "second", "third"]
    assert rows[1]["reason"] == "RuntimeError: no such instruction"
    assert rows[2]["ms"] == "nan"
    # Nothing is measured twice, not even what failed.
    assert worker.work(one, "kernels", [Task(task.name, broken) for task in tasks]) == 0
    assert len((tmp_path / record.FILE).read_text().splitlines()) == 3
    assert worker.work(setting(tmp_path, ends=0.0), "kernels", [Task("fourth", broken)]) == worker.UNFINISHED


def test_after_a_broken_context_the_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    broken = setting(tmp_path, device=torch.device("cuda"))
    after = Task("after", lambda: {"ms": 1.0})
    assert worker.work(broken, "check", [Task("illegal", illegal), after]) == worker.BROKEN
    assert [row["name"] for row in lines(tmp_path)] == ["illegal"]
    assert worker.work(broken, "check", [Task("illegal", illegal), after]) == 0

    def full() -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    assert worker.work(broken, "check", [Task("full", full)]) == 0


def test_what_there_was_no_time_for_is_tried_again(tmp_path: Path) -> None:
    def slow() -> dict[str, Any]:
        raise record.OutOfTimeError("after 3 s")

    assert worker.work(setting(tmp_path), "memory", [Task("job", slow)]) == worker.UNFINISHED
    assert lines(tmp_path)[0]["again"]
    assert worker.work(setting(tmp_path), "memory", [Task("job", lambda: {"ms": 1.0})]) == 0
    (row,) = lines(tmp_path)
    assert row["ms"] == 1.0 and "again" not in row


DYING = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import record
out, scratch = Path(sys.argv[sys.argv.index("--out") + 1]), Path(sys.argv[sys.argv.index("--scratch") + 1])
if "it kills" not in record.settled(out, "check"):
    (scratch / "running-0").write_text("it kills")
    os.abort() if HOW == "dies" else time.sleep(60)
record.write(out, "check", "after it", "cpu", ms=1.0)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_piece_that_dies_is_started_once_more_without_what_it_died_of(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(DYING.replace("HOW", repr(how)), encoding="utf-8")
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", start)
    monkeypatch.setattr(runner, "LEAST", 0.5)
    options = runner.parse(["--out", str(tmp_path)])
    runner.run_piece("check", options, time.time() + (20 if how == "dies" else 3), "cpu")
    rows = {row["name"]: row for row in lines(tmp_path)}
    if how == "dies":
        assert "its process died" in rows["it kills"]["reason"] and not rows["it kills"]["again"]
        assert "after it" in rows and "reason" not in rows[record.WHOLE]
    else:
        # Cut off, it may be that only the time was short: the next command tries again.
        assert rows["it kills"]["again"] and rows[record.WHOLE]["again"] and "after it" not in rows


def test_every_kernel_and_change_has_a_check() -> None:
    found = cases.checks(CPU)
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    for name in cases.MAKER:
        assert any(one.startswith(f"{name}, ") for one in names)
    for word in ("stochastic", "compensated", "transposed", "on the device", "bf16 moments", "norms", "NaN", "experts"):
        assert any(word in one for one in names), word
    # What most steps launch is checked before the rest.
    assert [one.most_used for one in found] == sorted((one.most_used for one in found), reverse=True)
    assert found[0].most_used and not found[-1].most_used


def test_every_method_is_held_against_eager() -> None:
    assert {one.method for one in check.wholes()} == set(own_names())
    names = [one.name for one in check.wholes()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["two_sided_update, tall", "rescaled_update, stochastic, tall", "adam_direction, norms, tall"]
)
def test_a_check_finds_a_wrong_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (one for one in cases.checks(CPU) if one.name == name)
    choose = cases.pick

    def eager_only(operation: Any, backend: str | None, device: torch.device) -> Any:
        return choose(operation, "eager", device)

    monkeypatch.setattr("benchmarks.kernel_cases.pick", eager_only)
    assert check.judged(found)["right"]

    def wrong(operation: Any, backend: str | None, device: torch.device) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = choose(operation, "eager", device)(*args, **kwargs)
            changed = result[0] if isinstance(result, tuple) else kwargs.get("weight", result)
            changed[3, 5] += 1
            return result

        return run if backend == "triton" else choose(operation, "eager", device)

    monkeypatch.setattr("benchmarks.kernel_cases.pick", wrong)
    assert not check.judged(found)["right"]


def test_errors_of_the_sanitizer_are_told_by_kernel() -> None:
    said = "========= COMPUTE-SANITIZER\n---- gaussian\n---- gram\n========= Invalid __global__ read of size 2 bytes\n"
    found = sanitizer.read(said + "---- end\n========= ERROR SUMMARY: 1 error\n", ["gaussian", "gram", "square"])
    assert found["errors"] == {"gram": 1} and found["not_reached"] == ["square"] and not found["right"]
    assert sanitizer.read("---- gram\n---- end\n========= ERROR SUMMARY: 0 errors\n", ["gram"])["right"]


def test_flops_of_a_token() -> None:
    # 7B: 6 FLOPs a weight but those of the embedding, and 6 * 32 * 4096 * 2048 of attention.
    assert throughput.flops_per_token(PRESETS["llama_7b"], 2048) == pytest.approx(
        6 * (6_738_415_616 - 32_000 * 4096) + 6 * 32 * 4096 * 2048, rel=1e-4
    )


def test_tokens_of_another_kind_are_refused(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "wide.npy", np.zeros(8, dtype=np.int64))
    with pytest.raises(ValueError, match="expected uint16"):
        train.token_array(str(tmp_path / "wide.npy"))
    assert train.token_array(train.RANDOM).max() < train.VOCABULARY


MADE_UP: list[dict[str, Any]] = [
    {"piece": "limits", "name": "versions", "versions": {"torch": "2.x", "triton": "3.y"}},
    {"piece": "limits", "name": "copy 1024 MiB", "tb_s": 3.004},
    {"piece": "limits", "name": "product bf16", "tflop_s": 700.4},
    {"piece": "check", "name": "gaussian", "right": True},
    {"piece": "check", "name": "gram", "right": False},
    {"piece": "memory", "name": "m", "method": "M(rank=1)", "weights": "int8", "card_gb": 16, "simulated_bytes": 12.5e9,
     "allocated_bytes": 12.75e9, "reserved_bytes": 13e9, "process_bytes": 13.5e9, "tokens_s": 2048.4},
    {"piece": "steps", "name": "AdamW", "model": "7b", "whole": False, "rank": 0, "dtype": "torch.bfloat16",
     "ms": 2.0, "host_ms": 0.25},
    {"piece": "steps", "name": "GaLore", "model": "7b", "whole": False, "rank": 256, "dtype": "torch.bfloat16",
     "ms": 1.0, "host_ms": 0.5, "replayed_ms": 0.75, "refresh_share": 0.03},
    {"piece": "throughput", "name": "60m", "tokens_s": 123456.7, "mfu": 0.375, "share_of_measured_product": 0.5},
    {"piece": "kernels", "name": "gram, 7B", "ms": 0.5, "eager_ms": 0.75, "share": 0.875},
    {"piece": "converge", "name": "c", "optimizer": "AdamW", "lr": 1e-3, "updates": 400, "loss": 5.25, "tokens_s": 5e5},
    {"piece": "peers", "name": "fira FiraAdamW", "reason": "ModuleNotFoundError: No module named 'fira'"},
]  # fmt: skip


def test_the_tables_are_drawn_from_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / record.FILE
    path.write_text("".join(json.dumps({"device": "Some GPU", **row}) + "\n" for row in MADE_UP), encoding="utf-8")
    text = table.current(path)
    for line in (
        "| check | 1 of 2 | gram |",
        "| `M(rank=1)`, int8 weights | 16 GB | 12.50 | 12.75 | 13.00 | 13.50 | 2,048 |",
        "| AdamW | 2 | – | 0.25 | – | 1.00 |",
        "| GaLore | 1 | 0.75 | 0.5 | 3.0% | 0.50 |",
        "| 60m | 123,457 | 37.5% | 50.0% |",
        "| gram, 7B | 500 | 750 | 88% |",
        "| `AdamW` | 0.001 | 400 | 5.250 | 500,000 |",
        "Some GPU, torch 2.x, triton 3.y; a copy moves 3.00 TB/s, a bf16 product does 700 TFLOP/s.",
        "Without a figure: peers, fira FiraAdamW.",
    ):
        assert line in text.splitlines(), line
    # Every line of a table has as many cells as its head.
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1
    with pytest.raises(ValueError, match="no figures"):
        table.current(tmp_path / "missing.jsonl")
    page = readme.replaced(f"{table.BEGIN}\nold\n{readme.END}\n", text, table.BEGIN)
    assert "old" not in page and text in page


def test_the_page_names_every_piece_and_its_seconds() -> None:
    page = (runner.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert named == {name: str(piece.seconds) for name, piece in runner.PIECES.items()}
    first = list(runner.PIECES)[: list(runner.PIECES).index("throughput") + 1]
    assert sum(runner.PIECES[name].seconds for name in first) <= 540
    assert all((Path(runner.__file__).parent / f"{name}.py").exists() for name in runner.PIECES)


@pytest.mark.slow
def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "tokens.npy", np.arange(20_000, dtype=np.uint16) % 251)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), "--budget", "600"]
    command += ["--tokens", str(tmp_path / "tokens.npy"), "--updates", "2"]
    environment = {**runner.environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    whole = [row for row in lines(tmp_path / "out") if row["name"] == record.WHOLE]
    assert [row["piece"] for row in whole] == list(runner.PIECES)
    assert not [row for row in whole if "reason" in row], result.stdout
    wrong = [row for row in lines(tmp_path / "out") if row.get("right") is False]
    assert not wrong
    assert {path.name for path in (tmp_path / "out").iterdir()} == {record.FILE, runner.LOG}
