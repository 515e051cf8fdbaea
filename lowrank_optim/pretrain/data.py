"""From ``--dataset`` to micro-batches: what is there, how it is cut, and whether a resumed run still has it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowrank_optim.pretrain import corpus, shards, tokenization, tokens
from lowrank_optim.pretrain.batches import (
    Batch,
    Share,
    State,
    document_batches,
    ordered_rows,
    ordered_windows,
    padded_batch,
    shuffled_rows,
    shuffled_windows,
)
from lowrank_optim.pretrain.config import Resolved, UserError
from lowrank_optim.pretrain.sources import Saved, fingerprint, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """A tokenizer and two splits; ``fingerprint``, a JSON value, tells one data set and tokenizer from another."""

    tokenizer: PreTrainedTokenizerBase
    description: str
    fingerprint: Any
    train: Callable[[State | None], Iterator[tuple[Batch, State]]]
    validation: Callable[[], Iterator[Batch]]


def load_data(options: Resolved, *, vocab_size: int, rank: int = 0, world: int = 1, saved: Saved | None = None) -> Data:
    """Open the data set and the tokenizer of ``options`` for one of ``world`` processes.

    Args:
        options: say which, and how it is cut into sequences.
        vocab_size: of the model.
        rank: of this process.
        world: the number of processes.
        saved: where a run is resumed, what its data was.

    Raises:
        UserError: missing or broken data, other data than the checkpoint's without ``options.allow_changed_data``, or
            a tokenizer that does not fit ``vocab_size``.
    """
    share = Share(options.seq_len, options.batch_size, rank, world)
    if options.dataset == "stdlib":
        data = _stdlib(options, vocab_size, share)
    elif tokens.is_token_folder(options.dataset):
        data = _token_shards(options, share)
    else:
        data = _text(options, vocab_size, share, saved)
    tokenization.check_vocabulary(data.tokenizer, vocab_size, options.model)
    return data if saved is None else _continued(data, saved, allowed=options.allow_changed_data)


def _continued(data: Data, saved: Saved, *, allowed: bool) -> Data:
    """The same data, once it is that of the checkpoint or may be another."""
    before, now = saved.fingerprint, data.fingerprint
    if not isinstance(before, dict):
        found, notes = ["version 0.1 read text in another order, so that it begins anew"], []
    else:
        if before["tokenizer"] != now["tokenizer"]:
            raise UserError(f"Cannot resume {saved.folder}: the tokenizer is not the one that it was saved with")
        found, doubtful = shards.changes(before["files"], now["files"])
        found += ["it comes from another source"] * (before["source"] != now["source"])
        notes = [f"{name} was written anew with the same size; parts of it are as they were" for name in doubtful]
    if found and not allowed:
        more = f" and {len(found) - 3} more" * (len(found) > 3)
        raise UserError(
            f"Cannot resume {saved.folder}: the data is not what it was saved with ({'; '.join(found[:3])}{more}); "
            "--allow-changed-data continues with it"
        )
    description = _joined([data.description, *(f"since the checkpoint: {what}" for what in [*found, *notes])])
    if isinstance(before, dict):
        return replace(data, description=description)
    return replace(data, description=description, train=lambda _: data.train(None))


def _stdlib(options: Resolved, vocab_size: int, share: Share) -> Data:
    given = tokenization.load_tokenizer(options.tokenizer) if options.tokenizer else None
    if given:
        tokenization.check_vocabulary(given, vocab_size, options.model)
    text = corpus.load_stdlib(given, vocab_size, show=share.rank == 0)

    def train(state: State | None) -> Iterator[tuple[Batch, State]]:
        return shuffled_windows(text.train, *share, options.seed, state)

    def validation() -> Iterator[Batch]:
        return ordered_windows(text.validation, *share)

    line = f"stdlib: {len(text.train):,} tokens to train on, {len(text.validation):,} held out"
    lines = (line, _passes(options, share, len(text.train) // share.seq_len))
    return Data(text.tokenizer, _joined(lines), fingerprint(text.fingerprint, text.tokenizer), train, validation)


def _token_shards(options: Resolved, share: Share) -> Data:
    folder = Path(options.dataset)
    tokenizer = tokenization.load_tokenizer(options.tokenizer or options.dataset)
    training, held_out = tokens.read_tokens(folder, tokenizer)
    closing = tokenization.frame(tokenizer)[1]
    rows = len(training.tokens) // share.seq_len if options.pack else len(training.ends)
    if not rows or not len(held_out.ends):
        raise UserError(f"Invalid dataset: {folder} holds less than {share.seq_len} training tokens, or none held out")

    def batch(split: tokens.TokenSplit, numbers: Iterable[int]) -> Batch:
        return padded_batch([split.document(number) for number in numbers], share.seq_len, closing=closing)

    def train(state: State | None) -> Iterator[tuple[Batch, State]]:
        if options.pack:
            return shuffled_windows(training.tokens, *share, options.seed, state)
        found = shuffled_rows(rows, share, options.seed, state)
        return ((batch(training, numbers.tolist()), after) for numbers, after in found)

    def validation() -> Iterator[Batch]:
        if options.pack:
            return ordered_windows(held_out.tokens, *share)
        return (batch(held_out, numbers) for numbers in ordered_rows(len(held_out.ends), share))

    counts = [f"{len(split.ends):,} documents of {len(split.tokens):,} tokens" for split in (training, held_out)]
    lengths = training.lengths(1024)
    lines = (
        f"{folder}: {counts[0]} to train on, {counts[1]} held out",
        *_cut(options, lengths),
        _passes(options, share, rows),
    )
    files = [folder / f"{split}.{kind}" for split in tokens.SPLITS for kind in ("bin", "idx")]
    about = fingerprint("tokens", tokenizer, shards.stamps(folder, files))
    return Data(tokenizer, _joined(lines), about, train, validation)


def _text(options: Resolved, vocab_size: int, share: Share, saved: Saved | None) -> Data:
    source = open_source(options, vocab_size=vocab_size, show=share.rank == 0, saved=saved)
    cut = (source.tokenizer, share, vocab_size, bool(options.pack))
    lines = [source.description]
    if amount := source.amount:
        rows = amount.tokens / share.seq_len if options.pack else amount.documents
        lines += [*_cut(options, amount.lengths), _passes(options, share, rows)]
    return Data(
        source.tokenizer,
        _joined(lines),
        source.fingerprint,
        lambda state: document_batches(source.training, *cut, state),
        lambda: (batch for batch, _ in document_batches(source.held_out, *cut, None, partial=True)),
    )


def _cut(options: Resolved, lengths: Iterable[int]) -> list[str]:
    """How much of the text is lost where documents are not packed."""
    if options.pack:
        return []
    kept = sum(min(length, options.seq_len) for length in lengths) / sum(lengths)
    return [f"each document is cut or padded to {options.seq_len} tokens, which keeps {kept:.0%} of the text"]


def _passes(options: Resolved, share: Share, rows: float) -> str:
    """How often a run reads its text of so many sequences."""
    read = options.max_steps * options.accumulate * share.size * share.world
    tokens = f"{read * options.seq_len:,} {'packed tokens' if options.pack else 'tokens with padding'}"
    part = f"{read / rows:.2f} epochs" if read >= rows else f"{100 * read / rows:.2g} % of an epoch"
    return f"the run reads {tokens}, {part}"


def _joined(lines: Iterable[str]) -> str:
    return "\n           ".join(lines)


def read_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a background thread up to ``depth`` ahead; errors surface where they are due."""
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()
    end = object()

    def work() -> None:
        failed = None
        try:
            for item in items:
                made.put((item, None))
                room.acquire()
                if stop.is_set():
                    return
        except BaseException as error:
            failed = error
        made.put((end, failed))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        # A thread inside a tokenizer must not outlive the interpreter; one that waits for a network may.
        thread.join(timeout=5)
