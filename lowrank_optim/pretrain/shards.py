"""Documents in blocks, from shards of text on disk or from a hub dataset, resumable at every block.

A source is read as ``blocks(position)``: it yields ``(position, texts)``, where reading again from that position
gives the same block and all later ones. Documents are shuffled within a block, and local shards among themselves,
as a function of the seed and the position alone: nothing random has to be saved.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lowrank_optim.pretrain.config import UserError, user_errors

Position = dict[str, Any]
BLOCK = 512
# Where no validation data is marked, every 50th document is held out.
HOLD_OUT = 50
SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl", ".txt", ".txt.gz")


class Slice(NamedTuple):
    """Which documents a process reads: ``held_out`` says which part of an unmarked split, None = all of it."""

    rank: int
    world: int
    held_out: bool | None

    def takes(self, index: int) -> bool:
        if self.held_out is not None and (index % HOLD_OUT == 0) != self.held_out:
            return False
        return index % self.world == self.rank


class Documents(Protocol):
    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]: ...


def find_shards(dataset: str) -> tuple[list[Path], list[Path]]:
    """Training and validation shards of a file or folder; without a mark in the name a shard is for training.

    Raises:
        UserError: nothing there, no known kind of file, or a shard that is empty or unreadable at its start.
    """
    path = Path(dataset)
    if not path.exists():
        raise UserError(f"Invalid dataset: {dataset} does not exist")
    # Hidden files are what downloads and editors leave behind.
    inside = sorted(p for p in path.rglob("*") if not p.name.startswith(".")) if path.is_dir() else [path]
    shards = [p for p in inside if p.is_file() and p.name.lower().endswith(SUFFIXES)]
    if not shards:
        raise UserError(f"Invalid dataset: {dataset} holds no {', '.join('*' + s for s in SUFFIXES)} file")
    for shard in shards:
        if next(read_shard(shard), None) is None:
            raise UserError(f"Empty shard: {shard} holds no document")
    validation = [p for p in shards if "validation" in p.name.lower()]
    train = [p for p in shards if "validation" not in p.name.lower()]
    if not train:
        raise UserError(f"Invalid dataset: {dataset} holds validation shards only")
    return train, validation


def fingerprint(shards: list[Path]) -> str:
    """Changes with the name or size of a shard."""
    return hashlib.sha256(repr([(p.name, p.stat().st_size) for p in shards]).encode()).hexdigest()[:16]


def read_shard(path: Path, start: int = 0) -> Iterator[tuple[int, str]]:
    """``(index, text)`` of the documents of one shard, from index ``start`` on.

    JSON shards hold one object with a ``text`` a line; text shards hold documents separated by blank lines.
    """
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    line, index = 0, 0
    paragraph: list[str] = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if ".txt" in path.name.lower() and text.strip():
                    paragraph.append(text)
                elif paragraph or text.strip():
                    if index >= start:
                        yield index, "".join(paragraph).rstrip("\n") or _text_of(text, path, line)
                    index, paragraph = index + 1, []
            if paragraph and index >= start:
                yield index, "".join(paragraph).rstrip("\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"Broken shard: {path} after line {line} ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"Broken shard: {path} after line {line} is no UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"Cannot read shard {path}: {error.strerror or error}") from error


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"Broken shard: {path} line {number} is no JSON ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"Broken shard: {path} line {number} is no JSON object with a 'text' string")
    return text


@dataclass(frozen=True)
class LocalDocuments:
    """Shards on disk; ``loop`` starts over in another order of the shards after the last."""

    shards: list[Path]
    part: Slice
    seed: int
    loop: bool

    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]:
        at = {"epoch": 0, "shard": 0, "document": 0, **(position or {})}
        found = position is not None
        while True:
            order = list(self.shards)
            if self.loop:
                random.Random(f"{self.seed} {at['epoch']}").shuffle(order)
            for number in range(at["shard"], len(order)):
                at["shard"] = number
                block: list[str] = []
                for index, text in read_shard(order[number], at["document"]):
                    if self.part.takes(index):
                        block.append(text)
                    if len(block) == BLOCK:
                        yield self._block(at, block)
                        at["document"], block, found = index + 1, [], True
                if block:
                    yield self._block(at, block)
                    found = True
                at["document"] = 0
            if not self.loop:
                return
            if not found:
                raise UserError(f"No training document for process {self.part.rank} in {self.shards[0].parent}")
            at.update(epoch=at["epoch"] + 1, shard=0)

    def _block(self, at: Position, texts: list[str]) -> tuple[Position, list[str]]:
        if self.loop:
            random.Random(f"{self.seed} {sorted(at.items())}").shuffle(texts)
        return dict(at), texts


@dataclass(frozen=True)
class HubDocuments:
    """A streamed dataset of the Hugging Face hub, ``NAME[:CONFIG]``."""

    name: str
    split: str
    part: Slice
    seed: int
    loop: bool

    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]:
        at = {"epoch": 0, "document": 0, "stream": None, **(position or {})}
        while True:
            with user_errors(Exception):
                stream = open_stream(self.name, self.split)
            if self.part.world > 1:
                from datasets.distributed import split_dataset_by_node

                stream = split_dataset_by_node(stream, self.part.rank, self.part.world)
            # Without a saved state of the stream the way to the position is walked.
            index = 0
            if at["stream"] is not None:
                stream.load_state_dict(at["stream"])
                index = at["document"]
            last = _stream_state(stream)
            own = self.part._replace(rank=0, world=1)
            block: list[str] = []
            for record in self._records(stream):
                if index >= at["document"] and own.takes(index):
                    block.append(_field(record, self.name))
                index += 1
                if len(block) == BLOCK:
                    yield self._block(at, block)
                    before, last, block = last, _stream_state(stream), []
                    # datasets has had releases whose state stood still after a resume (datasets#8308):
                    # a position must not rest on a state that did not move.
                    at.update(document=index, stream=None if last == before else last)
            if block:
                yield self._block(at, block)
            if not self.loop:
                return
            if index == 0:
                raise UserError(f"Invalid dataset: {self.name} has no document in its split {self.split}")
            at = {"epoch": at["epoch"] + 1, "document": 0, "stream": None}

    def _records(self, stream: Any) -> Iterator[Any]:
        try:
            yield from stream
        # Network, parquet and gzip failures come as many unrelated classes.
        except Exception as error:
            raise UserError(f"Cannot read {self.name} from the hub: {' '.join(str(error).split())}") from error

    def _block(self, at: Position, texts: list[str]) -> tuple[Position, list[str]]:
        if self.loop:
            random.Random(f"{self.seed} {at['epoch']} {at['document']}").shuffle(texts)
        return dict(at), texts


def _stream_state(stream: Any) -> Any:
    return stream.state_dict() if hasattr(stream, "state_dict") else None


def open_stream(name: str, split: str) -> Any:
    """A streamed split of the hub dataset ``NAME[:CONFIG]``."""
    from datasets import load_dataset

    path, _, config = name.partition(":")
    return load_dataset(path, config or None, split=split, streaming=True)


def has_split(name: str, split: str) -> bool:
    """Whether the hub dataset ``NAME[:CONFIG]`` has a split of that name."""
    path, _, config = name.partition(":")
    try:
        from datasets import get_dataset_split_names

        return split in get_dataset_split_names(path, config or None)
    except ImportError as error:
        raise UserError("Hub datasets need datasets: pip install 'lowrank-optim[train]'") from error
    except Exception as error:
        raise UserError(
            f"Invalid dataset: {name!r} is no local path and cannot be read from the hub "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


def _field(record: Any, name: str) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise UserError(f"Invalid dataset: {name} has records without a 'text' string")
    return text
