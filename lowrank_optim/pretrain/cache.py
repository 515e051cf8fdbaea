"""A folder that is either complete or absent: the user's cache, and the write that checkpoints share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/lowrank-optim``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowrank-optim"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create ``target`` from what ``fill`` writes into a temporary folder beside it, in one rename.

    Every file reaches the disk before the rename, so a crash at any moment leaves either nothing or everything.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        fill(temporary)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        os.rename(temporary, target)
        _sync(target.parent)
    except BaseException:
        # An interrupt as well must leave nothing behind.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
