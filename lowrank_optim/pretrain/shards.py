"""Text on disk: which files belong to which split, and whether they are those that a run began with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.readers import SUFFIXES

# What datasets calls its splits, in files and in folders.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ENDING = rf"({'|'.join(map(re.escape, SUFFIXES))})$"
# Files in which datasets and the hub keep notes about the text.
NOTES = ("readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Files up to this size are hashed whole, of larger ones so many blocks of so many bytes over their length.
HASHED, BLOCKS, BLOCK = 2**25, 32, 2**16


def is_hub_name(dataset: str) -> bool:
    """Whether a data set is read from the hub: it is there by no name on disk, and no path by its looks."""
    meant = dataset.startswith(("/", "./", "../", "~")) or dataset.count("/") > 1 or dataset.endswith(SUFFIXES)
    return dataset == "c4" or not (meant or dataset == "stdlib" or Path(dataset).exists())


class Shards(NamedTuple):
    """The files of a data set by split."""

    train: list[Path]
    validation: list[Path]
    test: list[Path]


def find_shards(dataset: str) -> Shards:
    """The files of a data set by split; without a mark in its path below the data set a file is for training.

    Raises:
        UserError: nothing there, no known kind of file, or nothing to train on.
    """
    root = Path(dataset)
    if not root.exists():
        raise UserError(f"Invalid dataset: {dataset} does not exist")
    if not root.is_dir():
        if not root.name.lower().endswith(SUFFIXES):
            raise UserError(f"Invalid dataset: {dataset} is none of {', '.join('*' + s for s in SUFFIXES)}")
        return Shards([root], [], [])
    found = Shards([], [], [])
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        # Hidden files are what downloads and editors leave behind, cache-*.arrow what datasets does.
        hidden = any(part.startswith(".") for part in parts) or path.name.lower() in NOTES
        if hidden or path.match("cache-*.arrow") or not path.name.lower().endswith(SUFFIXES) or not path.is_file():
            continue
        getattr(found, split_of(parts)).append(path)
    if not any(found):
        raise UserError(f"Invalid dataset: {dataset} holds no {', '.join('*' + s for s in SUFFIXES)} file")
    if not found.train:
        raise UserError(f"Invalid dataset: {dataset} holds validation and test shards only")
    return found


def split_of(parts: Sequence[str]) -> str:
    """``train``, ``validation`` or ``test``, from the folders and the file name below a data set's root.

    The outermost part that names a split counts. A part names one if it begins with its word (``test_data``,
    ``validation-00000.json``), or ends with it but for numbers (``c4-validation.00000-of-00008.json.gz``); within other
    words, as in ``cross-validation-notes.txt``, it means something else.
    """
    for number, part in enumerate(parts):
        name = part.lower()
        if number == len(parts) - 1:
            name = re.sub(ENDING, "", name)
        for split, words in SPLITS.items():
            word = f"({'|'.join(words)})"
            if re.fullmatch(rf"{word}([-._ 0-9].*)?|.*[-._ 0-9]{word}([-._ 0-9]|of)*", name):
                return split
    return "train"


def stamps(root: Path, files: Iterable[Path]) -> dict[str, list[Any]]:
    """Size, digest and time of change of files, by their names below ``root``; the digest of a long one is of parts."""
    found = {}
    for path in files:
        about = path.stat()
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            if about.st_size <= HASHED:
                digest.update(file.read())
            else:
                for block in range(BLOCKS):
                    file.seek(block * (about.st_size - BLOCK) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
        found[name_of(root, path)] = [about.st_size, digest.hexdigest(), about.st_mtime_ns]
    return found


def name_of(root: Path, path: Path) -> str:
    """What a file is called wherever the data set lies."""
    return path.relative_to(root).as_posix() if path != root else path.name


def changes(before: Mapping[str, Sequence[Any]], now: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
    """What differs between the :func:`stamps` of two times, and which long files may differ in what is not hashed."""
    found = [f"{name} is new" for name in now if name not in before]
    found += [f"{name} is gone" for name in before if name not in now]
    doubtful = []
    for name in sorted({*before} & {*now}):
        (size, digest, time), (new_size, new_digest, new_time) = before[name], now[name]
        if size != new_size:
            found.append(f"{name} had {size:,} bytes and has {new_size:,}")
        elif digest != new_digest:
            found.append(f"{name} has another content of the same size")
        elif time != new_time and size > HASHED:
            doubtful.append(name)
    return found, doubtful
