"""The benchmark of the kernels without a GPU: its checks run in the interpreter, its clock is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lowrank_kernels import compile as ahead_of_time

from benchmarks import kernel_cases, kernel_steps, kernels

CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_is_right(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", minversion="3.3")
    monkeypatch.setattr(kernels, "METHODS", ("GaLoreAdamW",))
    monkeypatch.setattr(kernels, "SIZES", {"tiny": kernel_cases.TINY})
    rows = kernels.check(device)
    assert all(row["right"] for row in rows), rows
    assert {"gram, tiny", "sddmm, tiny", "GaLoreAdamW, triton against eager"} <= {row["check"] for row in rows}


@pytest.mark.slow
def test_check_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    written = tmp_path / "checks.json"
    result = run("--check", "--json", str(written))
    assert result.returncode == 0, result.stderr
    rows = json.loads(written.read_text())["checks"]
    assert all(row["right"] for row in rows)
    names = {row["check"] for row in rows}
    assert {"gram, tiny", "sddmm, tiny", "Trion, triton against eager"} <= names
    assert all(f"| {name} |" in result.stdout for name in names)


def test_time_without_a_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks.kernels: error: --time needs a CUDA device, and there is none$"):
        kernels.main(["--check", "--time"])


def test_a_wrong_kernel_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(kernel_cases.cases(kernel_cases.TINY, device)))
    assert kernels.error_ratio(case) <= 1
    twin = kernel_cases.pick(case.operation, "triton", device)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = twin(*args, **kwargs)
        result[3, 5] += 0.01
        return result

    choose = kernel_cases.pick
    monkeypatch.setattr(
        kernel_cases, "pick", lambda f, backend, d: wrong if backend == "triton" else choose(f, backend, d)
    )
    assert kernels.error_ratio(case) > 1


def test_what_fails_is_said_and_not_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Any) -> float:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels, "error_ratio", broken)
    monkeypatch.setattr(kernels, "METHODS", ())
    rows = kernels.check(CPU)
    assert rows and not any(row["right"] for row in rows)
    assert "RuntimeError: no such instruction" in capsys.readouterr().out


def test_every_figure_is_made_from_the_clock(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny sizes, and a clock that says 2 ms; that every kernel runs is what the check is for."""
    monkeypatch.setattr(kernels, "median_ms", lambda call: 2.0)
    monkeypatch.setattr(kernels, "measured_limit", lambda device: kernel_steps.Limit(1e9, 1e12))
    monkeypatch.setattr(kernels, "SIZES", {"tiny": kernel_cases.TINY})
    monkeypatch.setattr(kernel_steps, "layer_shapes", lambda model: [(24, 40)] * 2)
    for module in (kernels, kernel_steps):
        monkeypatch.setattr(module, "RANKS", (8,))
        monkeypatch.setattr(module, "METHODS", ("GaLoreAdamW", "FiraAdamW", "DCTAdamW"))
    figures = kernels.measure(device, float("inf"))
    adam = figures["kernels"][0]
    # 22 bytes a value at 1 GB/s.
    assert adam["limit_ms"] == pytest.approx(22 * 137 * 17 / 1e6)
    assert adam["share"] == pytest.approx(adam["limit_ms"] / 2)
    assert {row["kernel"] for row in figures["kernels"]} >= {"gram", "gram, addend", "sltrain_weight", "move_columns_"}
    assert [(row["method"], row["backend"]) for row in figures["steps"][:2]] == [
        ("GaLoreAdamW", "triton"),
        ("GaLoreAdamW", "eager"),
    ]
    assert figures["steps"][4]["limit_ms"] is None
    met = {row["target"]: row["value"] for row in figures["targets"]}
    assert met["Fira / GaLore, rank 8"] == 1
    assert met["DCTAdamW, rank 8: step / fused AdamW with fp32 moments"] == pytest.approx(28 / 22)
    assert met["GaLoreAdamW, rank 8: refresh over 200 steps"] == 0
    assert kernels.markdown(figures["targets"]).count("\n") == len(figures["targets"]) + 1


def test_what_a_step_must_move() -> None:
    # One square weight of side 4 at rank 2: 32 bytes in, 32 out, the gradient, the moments, the basis; two products.
    assert kernel_steps.must_move_and_do("GaLoreAdamW", [(4, 4)], 2) == (3 * 32 + 16 * 8 + 2 * 8, 4 * 32)
    assert kernel_steps.must_move_and_do("FiraAdamW", [(4, 4)], 2) == (4 * 32 + 16 * 8 + 2 * 8, 4 * 32)
    assert kernel_steps.must_move_and_do("APOLLOAdamW", [(4, 4)], 2) == (4 * 32 + 16 * 8, 2 * 32)
    assert kernel_steps.must_move_and_do("Trion", [(4, 4)], 2) is None


def test_every_kernel_has_a_case() -> None:
    pytest.importorskip("triton", minversion="3.3")
    compiled = {case.label.split()[0].strip(",") for case in ahead_of_time.cases()}
    measured = {case.operation.__name__.rstrip("_") for case in kernel_cases.cases(kernel_cases.TINY, CPU)}
    assert compiled == measured
