"""Tokenizers: one from the hub or a folder, or a byte-level BPE trained on the data at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_optim.pretrain.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BPE_VOCAB = 8192
PAD, EOS = "<pad>", "</s>"


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


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    """Token ids of documents; each ends with the end-of-text token unless it was cut at ``max_length``."""
    end = tokenizer.eos_token_id
    # Without truncation tokenizers warn of documents longer than the length they were made for.
    rows = tokenizer(
        list(texts),
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    for row in rows:
        if end is not None and (not row or row[-1] != end) and (max_length is None or len(row) < max_length):
            row.append(end)
    return rows  # type: ignore[no-any-return]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same pieces."""
    pieces = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
