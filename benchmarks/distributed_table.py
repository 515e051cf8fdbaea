"""The table of docs/distributed.md, from what ``python -m tests.distributed --write`` wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import markdown, read_result

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN = "<!-- table:distributed -->"


def current() -> str:
    """The Markdown between the markers."""
    result = read_result("distributed")
    return "Not measured yet: `python -m tests.distributed --write`." if result is None else table(result)


def table(result: Mapping[str, Any]) -> str:
    """A line an optimizer: the worst of its rows and placements."""
    worst: defaultdict[tuple[str, str], float] = defaultdict(float)
    columns: list[str] = []
    rows: defaultdict[str, set[str]] = defaultdict(set)
    for row in result["table"]:
        name, column = row["row"].partition("-")[0], f"{row['processes']} × {row['dtype']}"
        columns += [] if column in columns else [column]
        if row["error"] is not None:
            rows[name].add(row["row"])
            worst[name, column] = max(worst[name, column], row["error"])
    refused = {row["row"] for row in result["table"] if row["error"] is None}
    saved: defaultdict[str, float] = defaultdict(float)
    for row in result["checkpoints"]:
        name = row["row"].partition("-")[0]
        saved[name] = max(saved[name], *row["errors"])
    chains = dict.fromkeys(" → ".join(map(str, row["processes"])) for row in result["checkpoints"])
    heads = ["optimizer", "rows", *columns, *chains]
    lines = []
    for name in rows:
        cells = [f"{worst[name, column]:.0e}" if (name, column) in worst else "–" for column in columns]
        cells += [f"{saved[name]:.0e}"] if chains else []
        lines.append([f"`{name}`", str(len(rows[name])), *cells])
    skipped = [row["skipped"] for row in result["table"] if row["skipped"] is not None]
    return "\n".join(
        [
            markdown(heads, lines),
            "",
            f"{len(result['table'])} runs, {sum(skipped)} of {len(skipped)} leave out an update that is not finite on "
            f"one process on all. Refused: {', '.join(sorted(refused)) or 'none'}.",
            "Made by `python -m tests.distributed --write`, whose calls add to what there is "
            f"(torch {result['versions']['torch']}), and `python -m benchmarks.table`.",
        ]
    )
