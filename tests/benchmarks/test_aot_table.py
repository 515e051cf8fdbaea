"""What is said of compiled kernels is what the compiler said of those that there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from lowrank_kernels.compile import SHARED_LIMIT

from benchmarks import aot_table, common, table
from benchmarks.gpu import table as gpu_table


@pytest.mark.parametrize("source", [aot_table, gpu_table], ids=["kernels.md", "gpu.md"])
def test_the_page_is_up_to_date(source: Any) -> None:
    text = source.PAGE.read_text(encoding="utf-8")
    assert table.replaced(text, source.current(), source.BEGIN) == text, "run python -m benchmarks.table"


def test_every_kernel_was_compiled_in_every_way_and_nothing_spills() -> None:
    pytest.importorskip("triton", minversion="3.3")
    # In a process of its own: the kernels of this one may run in the interpreter.
    code = "import json; from lowrank_kernels.compile import cases; print(json.dumps([case.label for case in cases()]))"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    labels = set(json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)))
    wanted = {(label, arch, aligned) for label in labels for arch in SHARED_LIMIT for aligned in (True, False)}
    by_version = aot_table.usages()
    assert len(by_version) >= 2
    readme = " ".join(table.README.read_text(encoding="utf-8").split())
    (line,) = (part for part in readme.split(". ") if "docs/kernels.md" in part)
    for version, rows in by_version.items():
        assert {(row.kernel, row.arch, row.aligned) for row in rows} == wanted
        assert not [complaint for row in rows if (complaint := row.complaint())]
        assert version in line
    assert all(f"sm_{arch}" in line for arch in SHARED_LIMIT)


def test_only_its_own_table_is_replaced() -> None:
    text = f"{table.BEGIN}\na\n{table.END}\n{aot_table.BEGIN}\nb\n{table.END}\n"
    assert table.replaced(text, "new", aot_table.BEGIN) == text.replace("\nb\n", "\nnew\n")


def test_nothing_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="no aot"):
        aot_table.current()
