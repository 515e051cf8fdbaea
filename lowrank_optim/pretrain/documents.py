"""Documents in blocks, from shards on disk, resumable at every block.

A source is read as ``blocks(position)``: it yields ``(position, texts)``, where reading again from that position
gives the same block and all later ones. Shards are shuffled among themselves and documents within a block, as a
function of the seed and the position alone: nothing random has to be saved, and every process reads the same.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.readers import TABLES, Fault, read_documents
from lowrank_optim.pretrain.shards import name_of

Position = dict[str, Any]
# Documents, or characters, that are shuffled and tokenized together.
BLOCK, BLOCK_CHARACTERS = 512, 2**21
# Share of the text that is held out where no validation data is marked.
HELD_OUT = 0.02
# Characters, or documents, that are read before a run, to count what is there and to find what is broken.
LOOK, LOOK_DOCUMENTS = 2**26, 2**18


class Documents(Protocol):
    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]: ...


@dataclass
class Faults:
    """Says once what is left out, and ends the run where one pass over the text meets more than ``limit``."""

    limit: int
    show: bool
    said: set[str] = field(default_factory=set)

    def meet(self, fault: Fault, number: int) -> None:
        """Take note of the ``number``-th fault of a pass.

        Raises:
            UserError: it is one too many.
        """
        if number > self.limit:
            raise UserError(f"Broken data: {fault}; --max-bad-documents allows {self.limit}")
        if self.show and fault not in self.said:
            print(f"warning: left out: {fault}", file=sys.stderr)
        self.said.add(fault)


class HoldOut(NamedTuple):
    """Which documents are held out: those with a :func:`place` below ``below`` and at most ``longest`` characters."""

    below: float = HELD_OUT
    longest: int = sys.maxsize

    def takes(self, at: float, characters: int) -> bool:
        return at < self.below and characters <= self.longest


def place(name: str, index: int) -> float:
    """A hash, from 0 to 1, of which document of which file it is."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{index}".encode(), digest_size=8).digest(), "big") / 2**64


def hold_out_of(sizes: Sequence[tuple[float, int]]) -> HoldOut:
    """Hold out ``HELD_OUT`` of the text or a little more: at least one document, and never all.

    Args:
        sizes: place and characters of every document.

    Raises:
        UserError: there is only one.
    """
    if len(sizes) < 2:
        raise UserError(
            "Invalid dataset: its text is a single document, of which none can be held out; add a file or folder "
            "named validation"
        )
    total = sum(size for _, size in sizes)
    # Not a tenth of all there is to learn, as long as there are shorter documents.
    longest = max(total // 10, min(size for _, size in sizes))
    held, below = 0, 0.0
    for at, size in sorted(sizes):
        if size <= longest and held < HELD_OUT * total:
            held, below = held + size, at
    return HoldOut(math.nextafter(below, 1.0), longest)


class Look(NamedTuple):
    """What a first reading of some shards found: place and characters of the documents, a few texts, and which share of
    the bytes on disk was read."""

    sizes: list[tuple[float, int]]
    sample: list[str]
    share: float


def look(shards: Sequence[Path], root: Path, text_field: str, faults: Faults) -> Look:
    """Read shards until ``LOOK`` characters, and the start of the others.

    Raises:
        UserError: more faults than allowed, or not one document.
    """
    sizes: list[tuple[float, int]] = []
    sample: list[str] = []
    characters = bad = read = total = 0
    for path in shards:
        whole = path.stat().st_size
        full, found, at = characters >= LOOK or len(sizes) >= LOOK_DOCUMENTS, False, whole
        with path.open("rb") as raw:
            for index, text in read_documents(path, text_field, raw=raw):
                found = True
                if isinstance(text, Fault):
                    bad += 1
                    faults.meet(text, bad)
                elif not full:
                    characters += len(text)
                    sizes.append((place(name_of(root, path), index), len(text)))
                    if len(sample) < 256:
                        sample.append(text)
                # How far a table has been read is not known.
                if full or ((characters >= LOOK or len(sizes) >= LOOK_DOCUMENTS) and path.suffix.lower() not in TABLES):
                    at = raw.tell()
                    break
        if not found:
            bad += 1
            faults.meet(Fault(f"{path} holds no document"), bad)
        total += whole
        read += 0 if full else at
    if not sizes:
        raise UserError(f"Invalid dataset: {root} holds no document")
    return Look(sizes, sample, read / total)


@dataclass(frozen=True)
class LocalDocuments:
    """Shards on disk.

    Args:
        root: the data set, below which a file has its name.
        shards: its files.
        text_field: which entry of a record is its text.
        faults: is told what is broken.
        seed: of the order.
        loop: start over after the last, in another order; otherwise the order is that of the names.
        hold_out: what is held out of these shards.
        held: read what is held out instead of the rest.
    """

    root: Path
    shards: Sequence[Path]
    text_field: str
    faults: Faults
    seed: int
    loop: bool
    hold_out: HoldOut | None = None
    held: bool = False

    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]:
        start = {"epoch": 0, "shard": None, "document": 0, "bad": 0, **(position or {})}
        while True:
            epoch, bad, first = start["epoch"], start["bad"], start["shard"]
            block: list[str] = []
            characters, empty = 0, first is None
            for path in sorted(self.shards, key=lambda path: self._key(epoch, name_of(self.root, path))):
                name = name_of(self.root, path)
                # By name, so that shards may come and go between two runs.
                if first is not None and self._key(epoch, name) < self._key(epoch, first):
                    continue
                for index, text in read_documents(path, self.text_field, start["document"] if name == first else 0):
                    if isinstance(text, Fault):
                        bad += 1
                        self.faults.meet(text, bad)
                        continue
                    if self.hold_out and self.hold_out.takes(place(name, index), len(text)) != self.held:
                        continue
                    block.append(text)
                    characters += len(text)
                    if len(block) == BLOCK or characters >= BLOCK_CHARACTERS:
                        yield start, self._shuffled(start, block)
                        start = {"epoch": epoch, "shard": name, "document": index + 1, "bad": bad}
                        block, characters, empty = [], 0, False
            if block:
                yield start, self._shuffled(start, block)
            elif empty and self.loop:
                raise UserError(f"Invalid dataset: {self.root} holds no document to train on")
            if not self.loop:
                return
            start = {"epoch": epoch + 1, "shard": None, "document": 0, "bad": 0}

    def _key(self, epoch: int, name: str) -> tuple[str, str]:
        drawn = hashlib.blake2b(f"{self.seed} {epoch} {name}".encode()).hexdigest() if self.loop else ""
        return drawn, name

    def _shuffled(self, start: Position, block: list[str]) -> list[str]:
        if self.loop:
            # Not by the number of faults so far: a repaired line must not change what comes after it.
            random.Random(f"{self.seed} {start['epoch']} {start['shard']} {start['document']}").shuffle(block)
        return block
