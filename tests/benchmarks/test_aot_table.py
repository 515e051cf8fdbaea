from __future__ import annotations

import pytest

from benchmarks import aot_table, common, table


def test_the_readme_is_up_to_date() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.replaced(text, aot_table.current(), aot_table.BEGIN) == text, "run python -m benchmarks.table"


def test_only_its_own_table_is_replaced() -> None:
    text = f"{table.BEGIN}\na\n{table.END}\n{aot_table.BEGIN}\nb\n{table.END}\n"
    assert table.replaced(text, "new", aot_table.BEGIN) == text.replace("\nb\n", "\nnew\n")


def test_nothing_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="no aot"):
        aot_table.current()
