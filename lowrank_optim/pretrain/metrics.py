"""``metrics.jsonl``: one JSON object a line, with no row twice however often a run is resumed.

A run that was rolled back makes some updates again. The rows of those that led to the divergence stay; every later row
says in ``rollbacks`` how many there have been, and the first of them, which has no loss, where the run went back to.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowrank_optim.pretrain.config import UserError

FILE = "metrics.jsonl"


class Metrics:
    """The metrics of one run folder, cut back on a resume to what a checkpoint knows (step 0 = start empty).

    A process that may not write gets ``folder=None``; its rows go nowhere.

    Raises:
        UserError: here and in every method, the file cannot be written.
    """

    def __init__(self, folder: Path | None, step: int, rollbacks: int = 0) -> None:
        self.file = None
        self.rollbacks = rollbacks
        self.last_evaluation: int | None = None
        if folder is None:
            return
        self.path = folder / FILE
        try:
            rows = read_metrics(self.path) if self.path.exists() and step else []
            # All rows before an earlier rollback, and those up to the step since.
            rows = [row for row in rows if (row.get("rollbacks", 0), row["step"]) <= (rollbacks, step)]
            new = folder / f".{FILE}.new"
            new.write_text("".join(_line(row) for row in rows), encoding="utf-8")
            os.replace(new, self.path)
            # Without a buffer that would be written once more when the process ends.
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        evaluations = [row for row in rows if "eval_loss" in row and row.get("rollbacks", 0) == rollbacks]
        self.last_evaluation = evaluations[-1]["step"] if evaluations else None

    def write(self, step: int, **row: Any) -> None:
        """Append one row; it survives the end of this process, though not a power failure before :meth:`sync`."""
        if not self.file:
            return
        marked = {"step": step, **row} | ({"rollbacks": self.rollbacks} if self.rollbacks else {})
        left = memoryview(_line(marked).encode())
        try:
            while left:
                left = left[self.file.write(left) or 0 :]
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Make every row durable, before a checkpoint that relies on them."""
        if not self.file:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"Cannot write {self.path}: {error.strerror or error}; saved checkpoints are intact")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a kill cut short is left out, and what is no row."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        numbers = isinstance(row, dict) and all(x is None or isinstance(x, (int, float)) for x in row.values())
        if numbers and isinstance(row.get("step"), int) and isinstance(row.get("rollbacks", 0), int):
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    # NaN and infinity are no JSON.
    clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
