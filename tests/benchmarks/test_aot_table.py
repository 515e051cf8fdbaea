"""What is said of compiled kernels is what the compiler said of those that there are."""

from __future__ import annotations

import pytest
from lowrank_kernels.compile import SHARED_LIMIT, cases

from benchmarks import aot_table, common, table


def test_every_kernel_was_compiled_in_every_way_and_nothing_spills() -> None:
    pytest.importorskip("triton", minversion="3.3")
    wanted = {(case.label, arch, aligned) for case in cases() for arch in SHARED_LIMIT for aligned in (True, False)}
    by_version = aot_table.usages()
    assert len(by_version) >= 2
    page = " ".join(aot_table.PAGE.read_text(encoding="utf-8").split())
    (line,) = (part for part in page.split(". ") if "without spilling a register" in part)
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
