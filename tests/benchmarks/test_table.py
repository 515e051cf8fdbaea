"""README.md and docs/ hold the tables that the measured figures make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos_table, digests, reference, table
from benchmarks.baselines import own_names

pytest.importorskip("transformers")


def timed(to_floor: float) -> dict[str, Any]:
    return {"to_floor": to_floor, "full_size_temporaries": 2.0, "state_bytes": 4e6}


STEP = {
    "command": "python -m benchmarks.step",
    "machine": {"processor": "P", "threads": 2},
    "versions": {"torch": "2.x"},
    "models": {
        "llama_60m": {
            "rank": 128,
            "dtype": "fp32",
            "weight_bytes": 2e6,
            "methods": {"GaLoreAdamW": timed(1.234), "torch AdamW fused": timed(0.5), "fira FiraAdamW": timed(3.0)},
            "refresh": {"power": {"svd_to_this": 31.7}},
        }
    },
}


def cells(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(("page", "marker", "make"), table.TABLES, ids=[marker[5:-4] for _, marker, _ in table.TABLES])
def test_pages_are_up_to_date(page: Path, marker: str, make: Callable[[], str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert table.replaced(text, make(), marker) == text, "run python -m benchmarks.table"


@pytest.mark.parametrize("part", [chaos_table, digests])
def test_what_a_run_survives_is_up_to_date(part: Any) -> None:
    text = part.PAGE.read_text(encoding="utf-8")
    assert table.replaced(text, part.current(), part.BEGIN) == text, "run python -m benchmarks.table"


@pytest.mark.slow
def test_a_row_an_optimizer_from_the_figures() -> None:
    text = table.table(STEP, {"errors": {"GaLoreAdamW": {"a": 3e-6, "b": 4e-6, "c": 9e-4}}})
    state, *rest = cells(text, "`GaLoreAdamW`")
    # Two moments and a basis of rank 128 beside 512 x 512 and 1376 x 512 values.
    assert rest == ["2.58 / 1.58 / 1.09", "1.23", "2", "32", "4e-06 (9e-04)"]
    adamw = cells(text, "`torch.optim.AdamW`, fused")
    # Two bf16 moments of 6.74 billion parameters.
    assert adamw == ["26.95", "8.00", "0.50", "2", "–", "–"]
    assert 0 < float(state) < float(adamw[0])
    assert cells(text, "fira FiraAdamW")[2] == "3.00"
    assert all(cells(text, f"`{name}`") for name in own_names())
    unmeasured = next(name for name in own_names() if name != "GaLoreAdamW")
    assert cells(text, f"`{unmeasured}`")[2:4] == ["–", "–"]


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.replaced(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="expected the lines"):
        table.replaced("nothing", "new")


def test_errors_are_read_from_pytests_report(tmp_path: Any) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="t[wide]"><properties>'
        '<property name="reference error FiraAdamW" value="2e-06"/></properties></testcase>'
        '<testcase name="other"/></testsuite></testsuites>'
    )
    assert reference.recorded_errors(report) == {"FiraAdamW": {"t[wide]": 2e-6}}
