"""The table of docs/reliability.md: what became of every fault, from what ``python -m tests.chaos`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import markdown, needed_result

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN = "<!-- table:chaos -->"


def current() -> str:
    """A row a kind of fault.

    Raises:
        ValueError: no faults were tried.
    """
    result = needed_result("chaos", "tests.chaos")
    return table(result)


def table(result: dict[str, Any]) -> str:
    """Markdown of what the suite wrote."""
    header = ("fault", "tries", "noticed or harmless", "saved updates lost", "continuation identical")
    rows = [
        (*(str(row[key]) for key in ("fault", "tries", "noticed", "lost")), f"{row['identical']} of {row['continued']}")
        for row in result["rows"]
    ]
    versions, done, parts = result["versions"], result["done"], result["parts"]
    so_far = f"Interrupted after {done} of {parts} parts. " if done < parts else ""
    caption = (
        f"{so_far}torch {versions['torch']}, Python {versions['python']}. "
        f"Made by `{result['command']}` and `python -m benchmarks.table`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"
