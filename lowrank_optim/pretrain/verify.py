"""Whether the checkpoints of a run are what was written."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank_optim.pretrain import checkpoint
from lowrank_optim.pretrain.config import UserError


def verify(folder: Path) -> int:
    """Read every file of a checkpoint, or of all checkpoints of a run, and print a line for each checkpoint.

    Returns:
        0 where all are whole, 1 where one is not.

    Raises:
        UserError: there is no checkpoint.
    """
    found = [folder] if (folder / checkpoint.STATE).is_file() else checkpoint.numbered(folder)
    if not found:
        raise UserError(f"Invalid folder: {folder} is no checkpoint and holds none")
    reasons = {path: checkpoint.damage(path) for path in found}
    for path, reason in reasons.items():
        print(f"{path}: {f'BROKEN, {reason}' if reason else _whole(path)}")
    return int(any(reasons.values()))


def _whole(path: Path) -> str:
    files = json.loads((path / checkpoint.STATE).read_text(encoding="utf-8")).get("files")
    if files is None:
        return "complete, of a version without digests"
    return f"whole, {len(files)} files, {sum(file['size'] for file in files.values()):,} bytes"
