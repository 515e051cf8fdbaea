"""Kernels compile for real GPUs on a machine that has none, without spills and within the chips' shared memory."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import lowrank_kernels
import pytest
from lowrank_kernels.compile import SHARED_LIMIT, Usage, cases, markdown

# Every thread keeps 64 values through a loop, and may have 32 registers.
SPILLING = """
import triton
import triton.language as tl
import lowrank_kernels.compile as tool

@triton.jit
def greedy(x_ptr, n):
    offsets = tl.arange(0, 2048)
    x = tl.load(x_ptr + offsets)
    for i in range(n):
        x = x * x + tl.load(x_ptr + offsets + i)
    tl.store(x_ptr + offsets, x)

case = tool.Case("greedy", greedy, {"x_ptr": "*fp32", "n": "i32"}, {}, {"num_warps": 1, "maxnreg": 32})
tool.cases = lambda: iter([case])
tool.main(["--arch", "90"])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    # In a process of its own: here the kernels are decorated for the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [("--arch", "90"), ()], ids=["sm_90", "all"])
def test_no_kernel_spills_or_takes_too_much_shared_memory(chosen: tuple[str, ...], tmp_path: Path) -> None:
    written = tmp_path / "aot.json"
    written.write_text('{"kernels": {"0.0.0": []}}')
    result = run("-m", "lowrank_kernels.compile", *chosen, "--json", str(written))
    assert result.returncode == 0, result.stderr
    found = json.loads(written.read_text())["kernels"]
    # Beside those of another triton, which stay.
    assert found.pop("0.0.0") == []
    ((_, figures),) = found.items()
    rows = [Usage(**row) for row in figures]
    # Every module is among them, but for parts of kernels; what is printed is what is written.
    modules = {info.name for info in pkgutil.iter_modules(lowrank_kernels.__path__) if not info.name.startswith("_")}
    assert {row.kernel.split()[0].strip(",") for row in rows} == modules - {"compile", "rounding", "tiles"}
    assert len(rows) == 2 * len({(row.kernel, row.arch) for row in rows}) and any(row.aligned for row in rows)
    assert {row.arch for row in rows} >= ({90} if chosen else {80, 89, 90})
    assert all(0 < row.registers <= 255 for row in rows)
    assert result.stdout.strip() == markdown(rows)


def test_a_spill_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    result = run(str(script))
    assert result.returncode == 1
    assert "greedy (unaligned) on sm_90" in result.stderr and "local memory" in result.stderr


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_more_shared_memory_than_a_block_can_have_is_an_error(arch: int) -> None:
    fits = Usage("k", arch, True, 255, 0, SHARED_LIMIT[arch])
    assert fits.complaint() is None
    assert "shared memory" in str(fits._replace(shared=SHARED_LIMIT[arch] + 1).complaint())


def test_a_module_without_cases_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing_here.py").write_text("")
    monkeypatch.setattr(lowrank_kernels, "__path__", [str(tmp_path)])
    with pytest.raises(TypeError, match="nothing_here has no aot_cases"):
        list(cases())


def test_two_lines_a_kernel_and_a_column_an_architecture() -> None:
    rows = [Usage("k", arch, aligned, 40 + arch + aligned, 0, 1536) for aligned in (True, False) for arch in (90, 80)]
    lines = markdown(rows).splitlines()
    assert lines[2:4] == [
        "| k | aligned | 121 / 0 / 1.5 | 131 / 0 / 1.5 |",
        "| k | unaligned | 120 / 0 / 1.5 | 130 / 0 / 1.5 |",
    ]
