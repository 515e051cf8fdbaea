"""``metrics.jsonl``: one JSON object a line, with no row twice however often a run is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Metrics:
    """The metrics of one run folder, cut back to ``step`` on a resume (0 = start empty).

    A process that may not write gets ``folder=None``; its rows go nowhere.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.file = None
        if folder is None:
            return
        path = folder / FILE
        rows = read_metrics(path) if path.exists() and step else []
        kept = folder / f".{FILE}.new"
        kept.write_text("".join(_line(row) for row in rows if row["step"] <= step), encoding="utf-8")
        os.replace(kept, path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Append one row; it survives the end of this process, though not a power failure before :meth:`sync`."""
        if self.file:
            self.file.write(_line(row))
            self.file.flush()

    def sync(self) -> None:
        """Make every row durable, before a checkpoint that relies on them."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    # NaN and infinity are no JSON.
    clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
