"""A folder that is either complete or absent: the user's cache, and the write that checkpoints share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

# How the names of folders begin that are being written, or removed.
TEMPORARY = ".tmp-"


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/lowrank-optim``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowrank-optim"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create ``target`` from what ``fill`` writes into a temporary folder beside it, in one rename.

    Every file reaches the disk before the rename, so a crash at any moment leaves either nothing or everything.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
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


def remove_folder(target: Path) -> None:
    """Remove ``target``; a crash at any moment leaves it whole or not under its name."""
    temporary = _temporary(target)
    os.rename(target, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}"


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
