"""``gpu.jsonl``: one figure a line, on disk before the next is begun."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = "gpu.jsonl"
# In the place of a figure's name: the piece itself, once it has reached its end or was cut short.
WHOLE = "the whole piece"


class OutOfTimeError(Exception):
    """The time of the piece was over before there was a figure; another run should try again."""


class Task(NamedTuple):
    """One figure: its name within the piece, and what measures it."""

    name: str
    run: Callable[[], Mapping[str, Any]]


def write(folder: Path, piece: str, name: str, device: str, **figures: Any) -> None:
    """Append one line and wait until the disk has it."""
    line = json.dumps({"piece": piece, "name": name, "device": device, **_clean(figures)}, allow_nan=False) + "\n"
    with (folder / FILE).open("a", encoding="utf-8") as file:
        # Several processes share a piece.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    print(line[:400].rstrip(), flush=True)


def _clean(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file in their order, of several with the same piece and name the last alone.

    What a kill left of a line is passed over.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["piece"], row["name"]] = row
    return list(found.values())


def settled(folder: Path, piece: str) -> set[str]:
    """The names of the figures of a piece that need not be measured again: those that failed are among them."""
    return {row["name"] for row in read(folder / FILE) if row["piece"] == piece and not row.get("again")}


def end_last_line(folder: Path) -> None:
    """After a kill, let the next line begin on a line of its own."""
    path = folder / FILE
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
