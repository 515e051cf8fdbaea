"""From ``--dataset`` to micro-batches: which documents, cut and padded or packed, in an order that resumes.

Every batch travels with the state that continues after it, so a checkpoint holds exactly what was consumed,
however far a background thread has read ahead.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_optim.pretrain import corpus, shards, tokenization
from lowrank_optim.pretrain.cache import cache_root, write_folder
from lowrank_optim.pretrain.config import Resolved, UserError
from lowrank_optim.pretrain.shards import SUFFIXES, Documents, HubDocuments, LocalDocuments, Slice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
C4 = "allenai/c4:en"
HUB_TOKENIZER = "t5-base"
# Text that a tokenizer is trained on where none is given.
BPE_CHARACTERS = 10_000_000
State = dict[str, Any]
T = TypeVar("T")


class Batch(NamedTuple):
    """One micro-batch: ``ids`` and ``labels``, both (sequences, tokens); labels are -100 on padding."""

    ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """Tokens whose prediction counts in the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


@dataclass(frozen=True)
class Data:
    """A tokenizer and two splits; ``fingerprint`` tells one data set and tokenizer from another."""

    tokenizer: PreTrainedTokenizerBase
    description: str
    fingerprint: str
    train: Callable[[State | None], Iterator[tuple[Batch, State]]]
    validation: Callable[[], Iterator[Batch]]


def load_data(options: Resolved, *, vocab_size: int, rank: int = 0, world: int = 1) -> Data:
    """Open the data set and the tokenizer of ``options`` for one of ``world`` processes.

    Raises:
        UserError: missing or broken data, or a tokenizer that does not fit ``vocab_size``.
    """
    tokenizer = tokenization.load_tokenizer(options.tokenizer) if options.tokenizer else None
    if tokenizer:
        tokenization.check_vocabulary(tokenizer, vocab_size, options.model)
    if options.dataset == "stdlib":
        return _stdlib(options, tokenizer, vocab_size, rank, world)
    return _documents(options, tokenizer, vocab_size, rank, world)


def _stdlib(
    options: Resolved, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, rank: int, world: int
) -> Data:
    text = corpus.load_stdlib(tokenizer, vocab_size, show=rank == 0)
    cut = (options.seq_len, options.batch_size, rank, world)
    if len(text.train) < options.seq_len * options.batch_size * world:
        raise UserError(f"Invalid batch_size: {options.batch_size}, one batch is longer than all of stdlib")

    def train(state: State | None) -> Iterator[tuple[Batch, State]]:
        return shuffled_windows(text.train, *cut, options.seed, state)

    description = f"stdlib, {len(text.train):,} training and {len(text.validation):,} validation tokens, packed"
    return Data(text.tokenizer, description, text.fingerprint, train, lambda: ordered_windows(text.validation, *cut))


def _documents(
    options: Resolved, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, rank: int, world: int
) -> Data:
    training: Documents
    held_out: Documents
    unmarked = (Slice(rank, world, False), Slice(rank, world, True))
    marked = (Slice(rank, world, None), Slice(rank, world, None))
    if options.dataset != "c4" and (Path(options.dataset).exists() or looks_local(options.dataset)):
        train_shards, validation_shards = shards.find_shards(options.dataset)
        parts = marked if validation_shards else unmarked
        training = LocalDocuments(train_shards, parts[0], options.seed, loop=True)
        held_out = LocalDocuments(validation_shards or train_shards, parts[1], options.seed, loop=False)
        source = shards.fingerprint([*train_shards, *validation_shards])
        description = f"{options.dataset}, {len(train_shards)} + {len(validation_shards)} shards"
        if tokenizer is None:
            tokenizer = trained_tokenizer(train_shards, source, vocab_size)
    else:
        source = C4 if options.dataset == "c4" else options.dataset
        parts, split = (marked, "validation") if shards.has_split(source, "validation") else (unmarked, "train")
        training = HubDocuments(source, "train", parts[0], options.seed, loop=True)
        held_out = HubDocuments(source, split, parts[1], options.seed, loop=False)
        description = f"{source} from the hub, streamed"
        if tokenizer is None:
            tokenizer = tokenization.load_tokenizer(HUB_TOKENIZER)
            tokenization.check_vocabulary(tokenizer, vocab_size, options.model)
    cut = (tokenizer, options.seq_len, options.batch_size, vocab_size)
    description += ", packed" if options.pack else f", each document cut or padded to {options.seq_len} tokens"
    return Data(
        tokenizer,
        description,
        f"{source}-{tokenization.fingerprint(tokenizer)}",
        lambda state: document_batches(training, *cut, options.pack, state),
        lambda: (batch for batch, _ in document_batches(held_out, *cut, options.pack, None, partial=True)),
    )


def looks_local(dataset: str) -> bool:
    """Whether a name that does not exist on disk was meant as a path."""
    return dataset.startswith(("/", "./", "../", "~")) or dataset.count("/") > 1 or dataset.endswith(SUFFIXES)


def trained_tokenizer(paths: list[Path], source: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """A BPE trained on the first ``BPE_CHARACTERS`` of the shards, cached."""
    pieces = min(vocab_size, tokenization.BPE_VOCAB)
    folder = cache_root() / f"bpe-{source}-{pieces}"

    def texts() -> Iterator[str]:
        characters = 0
        for path in paths:
            for _, text in shards.read_shard(path):
                yield text
                characters += len(text)
                if characters > BPE_CHARACTERS:
                    return

    if not folder.is_dir():
        tokenizer = tokenization.train_bpe(texts(), pieces)
        serialized = tokenizer.backend_tokenizer.to_str()
        try:
            write_folder(folder, lambda into: _write_text(into / "bpe.json", serialized))
        except OSError as error:
            if not folder.is_dir():
                print(f"warning: cannot cache the tokenizer in {folder} ({error})", file=sys.stderr)
                return tokenizer
    return tokenization.wrap((folder / "bpe.json").read_text(encoding="utf-8"))


def shuffled_windows(
    tokens: NDArray[Any], seq_len: int, size: int, rank: int, world: int, seed: int, state: State | None
) -> Iterator[tuple[Batch, State]]:
    """Endless batches of windows of a token array, in a new order every epoch; incomplete batches are left out."""
    at = state or {"epoch": 0, "batch": 0}
    windows = len(tokens) // seq_len
    while True:
        order = np.random.default_rng([seed, at["epoch"]]).permutation(windows)
        for number in range(at["batch"], windows // (size * world)):
            first = (number * world + rank) * size
            at = {"epoch": at["epoch"], "batch": number + 1}
            yield _window_batch(tokens, order[first : first + size], seq_len), at
        at = {"epoch": at["epoch"] + 1, "batch": 0}


def ordered_windows(tokens: NDArray[Any], seq_len: int, size: int, rank: int, world: int) -> Iterator[Batch]:
    """Every whole window of a token array once, the processes taking turns."""
    starts = np.arange(len(tokens) // seq_len)
    for first in range(rank * size, len(starts), size * world):
        yield _window_batch(tokens, starts[first : first + size], seq_len)


def _window_batch(tokens: NDArray[Any], windows: NDArray[Any], seq_len: int) -> Batch:
    rows = tokens[windows[:, None] * seq_len + np.arange(seq_len)]
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids, ids)


def document_batches(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    size: int,
    vocab_size: int,
    pack: bool,
    state: State | None,
    *,
    partial: bool = False,
) -> Iterator[tuple[Batch, State]]:
    """Batches of documents and the state after each; ``partial`` yields the last, smaller batch as well."""
    rows: list[list[int]] = []
    after: State = state or {}
    for row, after in _rows(documents, tokenizer, seq_len, pack, state):
        if max(row) >= vocab_size:
            raise UserError(f"Invalid token id: {max(row)}, expected less than the model's {vocab_size}")
        rows.append(row)
        if len(rows) == size:
            yield _pad(rows, seq_len, tokenizer), after
            rows = []
    if rows and partial:
        yield _pad(rows, seq_len, tokenizer), after


def _rows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    pack: bool,
    state: State | None,
) -> Iterator[tuple[list[int], State]]:
    """Token rows of at most ``seq_len``; the state names a block, what was used of it and what it began with."""
    state = state or {"position": None, "used": 0, "rest": []}
    used, rest = state["used"], state["rest"]
    for position, texts in documents.blocks(state["position"]):
        encoded = tokenization.encode(tokenizer, texts, None if pack else seq_len)
        tail: list[int] = []
        if pack:
            joined = [*rest, *(token for row in encoded for token in row)]
            whole = len(joined) - len(joined) % seq_len
            encoded = [joined[i : i + seq_len] for i in range(0, whole, seq_len)]
            tail = joined[whole:]
        else:
            # One token has no successor to predict.
            encoded = [row for row in encoded if len(row) > 1]
        for number in range(used, len(encoded)):
            yield encoded[number], {"position": position, "used": number + 1, "rest": rest}
        used, rest = 0, tail


def _pad(rows: list[list[int]], seq_len: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    # On the right and without an attention mask: causal attention lets no real token see the padding.
    ids = torch.full((len(rows), seq_len), tokenizer.pad_token_id or 0)
    labels = torch.full((len(rows), seq_len), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return Batch(ids, labels)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a background thread up to ``depth`` ahead; errors surface where they are due."""
    made: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                return made.put(item, timeout=0.1)
        return None

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        # A thread inside a tokenizer must not outlive the interpreter; one that waits for a network may.
        thread.join(timeout=5)
