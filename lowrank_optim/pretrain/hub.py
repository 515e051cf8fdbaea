"""Documents of a data set of the Hugging Face hub, streamed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowrank_optim.pretrain import documents
from lowrank_optim.pretrain.config import UserError, user_errors
from lowrank_optim.pretrain.documents import Faults, HoldOut, Position, place
from lowrank_optim.pretrain.readers import Fault, text_of
from lowrank_optim.pretrain.shards import split_of


@dataclass(frozen=True)
class HubDocuments:
    """A streamed split of the hub data set ``NAME[:CONFIG]``; the rest as in :class:`LocalDocuments`."""

    name: str
    split: str
    text_field: str
    faults: Faults
    seed: int
    loop: bool
    hold_out: HoldOut | None = None
    held: bool = False

    def blocks(self, position: Position | None = None) -> Iterator[tuple[Position, list[str]]]:
        at = {"epoch": 0, "document": 0, "bad": 0, "stream": None, **(position or {})}
        while True:
            with user_errors(Exception):
                stream = open_stream(self.name, self.split)
            # Without a saved state of the stream the way to the position is walked.
            index, bad = 0, at["bad"]
            if at["stream"] is not None:
                stream.load_state_dict(at["stream"])
                index = at["document"]
            last = stream.state_dict()
            block: list[str] = []
            for record in self._records(stream):
                if index >= at["document"]:
                    text = text_of(record, self.text_field, f"{self.name} {self.split} record {index + 1}")
                    if isinstance(text, Fault):
                        bad += 1
                        self.faults.meet(text, bad)
                    elif not self.hold_out or self.hold_out.takes(place(self.name, index), len(text)) == self.held:
                        block.append(text)
                index += 1
                if len(block) == documents.BLOCK:
                    yield self._block(at, block)
                    before, last, block = last, stream.state_dict(), []
                    # datasets has had releases whose state stood still after a resume (datasets#8308):
                    # a position must not rest on a state that did not move.
                    at.update(document=index, bad=bad, stream=None if last == before else last)
            if block:
                yield self._block(at, block)
            if not self.loop:
                return
            if index == 0:
                raise UserError(f"Invalid dataset: {self.name} has no document in its split {self.split}")
            at = {"epoch": at["epoch"] + 1, "document": 0, "bad": 0, "stream": None}

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


def open_stream(name: str, split: str) -> Any:
    """A streamed split of the hub dataset ``NAME[:CONFIG]``."""
    from datasets import load_dataset

    path, _, config = name.partition(":")
    return load_dataset(path, config or None, split=split, streaming=True)


def validation_split(name: str) -> str | None:
    """What the hub data set ``NAME[:CONFIG]`` calls its validation split, None where it has none."""
    from datasets import get_dataset_split_names

    path, _, config = name.partition(":")
    try:
        names: list[str] = get_dataset_split_names(path, config or None)
    except Exception as error:
        raise UserError(
            f"Invalid dataset: {name!r} is no local path and cannot be read from the hub "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    return next((split for split in names if split_of([split]) == "validation"), None)
