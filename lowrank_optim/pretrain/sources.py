"""Text and its tokenizer: what a data set holds, what of it is held out, and how a run says so."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowrank_optim.pretrain import documents, shards, tokenization
from lowrank_optim.pretrain.cache import cache_root, write_folder
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.documents import Faults, HoldOut, LocalDocuments, hold_out_of, look
from lowrank_optim.pretrain.hub import HubDocuments, validation_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4 = "allenai/c4:en"
HUB_TOKENIZER = "t5-base"
# Text that a tokenizer is trained on where none is given.
BPE_CHARACTERS = 10_000_000
# Documents whose tokens are counted to estimate those of all.
COUNTED = 128


class Saved(NamedTuple):
    """What a checkpoint says of its data, and its folder, which holds the tokenizer."""

    fingerprint: Any
    folder: Path


class Amount(NamedTuple):
    """How much text a split holds, ``exact`` or estimated from a part of it, and the tokens of a few documents."""

    documents: int
    tokens: int
    exact: bool
    lengths: list[int]

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        return f"{about}{self.documents:,} documents of about {self.tokens:,} tokens"


class Source(NamedTuple):
    """Text to be encoded.

    Attributes:
        tokenizer: for it.
        training, held_out: the documents of both splits; the first start over after the last.
        fingerprint: a JSON value that tells the text and the tokenizer from others.
        description: one line.
        amount: of the training text, None where nothing is known before it has been read.
    """

    tokenizer: PreTrainedTokenizerBase
    training: LocalDocuments | HubDocuments
    held_out: LocalDocuments | HubDocuments
    fingerprint: dict[str, Any]
    description: str
    amount: Amount | None


def fingerprint(source: str, tokenizer: PreTrainedTokenizerBase, files: Any = None, hold_out: Any = None) -> Any:
    """A JSON value that tells data from other data."""
    return {
        "source": source,
        "files": files or {},
        "tokenizer": tokenization.fingerprint(tokenizer),
        "hold_out": list(hold_out) if hold_out else None,
    }


def open_source(options: Options, *, vocab_size: int, show: bool, saved: Saved | None = None) -> Source:
    """The text of ``options.dataset``, looked through up to ``LOOK`` characters.

    Args:
        options: say where it is, and its tokenizer.
        vocab_size: the most pieces that a tokenizer of its own may have.
        show: say what is broken.
        saved: where a run is resumed, what its text was; its tokenizer and what it held out are kept.

    Raises:
        UserError: nothing to read, more broken documents than allowed, or no tokenizer.
    """
    name, tokenizer = options.tokenizer, None
    if saved and not name and (saved.folder / "tokenizer_config.json").is_file():
        name = str(saved.folder)
    if name:
        tokenizer = tokenization.load_tokenizer(name)
    faults = Faults(options.max_bad_documents, show)
    if shards.is_hub_name(options.dataset):
        return _from_hub(options, tokenizer, faults)
    return _from_disk(options, tokenizer, faults, vocab_size, saved)


def _from_disk(
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None,
    faults: Faults,
    vocab_size: int,
    saved: Saved | None,
) -> Source:
    root, field = Path(options.dataset), options.text_field
    found = shards.find_shards(options.dataset)
    seen = look(found.train, root, field, faults)
    apart = look(found.validation, root, field, faults) if found.validation else None
    hold_out = None
    if apart is None:
        hold_out = hold_out_of(seen.sizes) if seen.share == 1 else HoldOut()
        if saved and isinstance(saved.fingerprint, dict) and saved.fingerprint["hold_out"]:
            # What was held out of a text stays so when the text grows.
            hold_out = HoldOut(*saved.fingerprint["hold_out"])
    training = LocalDocuments(root, found.train, field, faults, options.seed, True, hold_out)
    held_out = LocalDocuments(root, found.validation or found.train, field, faults, options.seed, False, hold_out, True)
    files = shards.stamps(root, [*found.train, *found.validation])
    if tokenizer is None:
        tokenizer = trained_tokenizer(replace(training, loop=False), files, vocab_size)
    lengths = [len(row) for row in tokenization.encode(tokenizer, seen.sample[:COUNTED])]
    per_character = sum(lengths) / sum(map(len, seen.sample[:COUNTED]))

    def amount(sizes: list[int], share: float) -> Amount:
        return Amount(round(len(sizes) / share), round(sum(sizes) * per_character / share), share == 1, lengths)

    kept = [size for at, size in seen.sizes if not (hold_out and hold_out.takes(at, size))]
    left = [size for at, size in seen.sizes if hold_out and hold_out.takes(at, size)]
    train, held = amount(kept, seen.share), amount(left, seen.share)
    if apart:
        held = amount([size for _, size in apart.sizes], apart.share)
    if held.exact and not held.documents:
        raise UserError(f"Invalid dataset: nothing of {root} is held out for validation")
    counts = f"{len(found.train)} training, {len(found.validation)} validation and {len(found.test)} test shards"
    return Source(
        tokenizer,
        training,
        held_out,
        fingerprint("disk", tokenizer, files, hold_out),
        f"{root}: {counts}; {train} to train on, {held} held out",
        train,
    )


def _from_hub(options: Options, tokenizer: PreTrainedTokenizerBase | None, faults: Faults) -> Source:
    name = C4 if options.dataset == "c4" else options.dataset
    marked = validation_split(name)
    hold_out = None if marked else HoldOut()
    tokenizer = tokenizer or tokenization.load_tokenizer(HUB_TOKENIZER)
    field, seed = options.text_field, options.seed
    return Source(
        tokenizer,
        HubDocuments(name, "train", field, faults, seed, True, hold_out),
        HubDocuments(name, marked or "train", field, faults, seed, False, hold_out, True),
        fingerprint(name, tokenizer, hold_out=hold_out),
        f"{name} from the hub, streamed, validation from {marked or f'{documents.HELD_OUT:.0%} of train'}",
        None,
    )


def trained_tokenizer(source: LocalDocuments, files: Any, vocab_size: int) -> PreTrainedTokenizerBase:
    """A BPE trained on the first ``BPE_CHARACTERS`` of some documents, cached by the files that they come from."""
    pieces = min(vocab_size, tokenization.BPE_VOCAB)
    contents = sorted((name, digest) for name, (_, digest, _) in files.items())
    key = hashlib.sha256(f"{source.text_field} {source.hold_out} {contents}".encode()).hexdigest()[:16]
    folder = cache_root() / f"bpe-{key}-{pieces}"

    def texts() -> Iterator[str]:
        characters = 0
        for _, block in source.blocks():
            for text in block:
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
