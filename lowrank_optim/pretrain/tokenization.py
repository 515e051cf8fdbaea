"""Tokenizers: one from the hub or a folder, or a byte-level BPE trained on the data at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowrank_optim.pretrain.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BPE_VOCAB = 8192
PAD, EOS = "<pad>", "</s>"
# Characters that are encoded at once.
PIECE = 2**16
# Characters a token that are encoded where only the first tokens count: more than most languages need, so that few
# documents are encoded twice.
HEAD, MARGIN = 6, 8


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of the hub."""
    from transformers import AutoTokenizer

    try:
        # Without the answer "no" it asks whether to run code that comes with a tokenizer.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # The hub client, the JSON readers and the model classes each have exceptions of their own.
    except Exception as error:
        where = "from this folder" if Path(name).exists() else "(no such folder, and not from the hub)"
        raise UserError(f"Cannot load tokenizer {name!r} {where}: {_first_line(error)}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE: every text has an encoding, none needs an unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer.to_str())


def wrap(serialized: str) -> PreTrainedTokenizerBase:
    """A ``tokenizer.json`` of ours as transformers' class, which the exported folder carries."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(serialized), pad_token=PAD, eos_token=EOS)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, model: str) -> None:
    """Refuse a tokenizer with more pieces than the model has embeddings.

    T5's ``<extra_id_…>`` sentinels do not count: they never occur in text.
    """
    largest = max(i for piece, i in tokenizer.get_vocab().items() if not piece.startswith("<extra_id_"))
    if largest >= vocab_size:
        raise UserError(
            f"Invalid tokenizer: its token ids reach {largest}, but {model} has a vocabulary of {vocab_size}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Token ids of documents, each ended by the end-of-text token where the tokenizer has one.

    A long document is encoded in pieces that end between two words: the time of some tokenizers grows faster than the
    length of a text.
    """
    pieces = [list(_pieces(text, PIECE)) for text in texts]
    encoded = iter(_encode(tokenizer, [piece for parts in pieces for piece in parts]))
    opening, closing = frame(tokenizer)
    end = tokenizer.eos_token_id
    if end is not None and end not in closing:
        closing = [*closing, end]
    return [
        np.concatenate([np.array(part, dtype=np.int32) for part in (opening, *islice(encoded, len(parts)), closing)])
        for parts in pieces
    ]


def encode_starts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[NDArray[np.int32]]:
    """The same as :func:`encode` up to the token ``length`` of each document; what comes after may be missing."""
    starts = [next(_pieces(text, HEAD * length)) for text in texts]
    rows = encode(tokenizer, starts)
    # The tokens at the cut may be others than those of the whole text.
    short = [i for i, row in enumerate(rows) if len(row) <= length + MARGIN and len(starts[i]) < len(texts[i])]
    for i, row in zip(short, encode(tokenizer, [texts[i] for i in short]), strict=True):
        rows[i] = row
    return rows


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        # The blank stays with the word behind it, as in the pieces of a tokenizer.
        end = text.rfind(" ", start + 1, start + size)
        end = end if end > start else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterable[list[int]]:
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        backend.no_truncation()
        backend.no_padding()
    # Without the offsets of tokens in the text, which take as long to make as the tokens.
    return (found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False))


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer itself puts before and after a text."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same pieces."""
    pieces = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
