"""Micro-batches of documents or of token arrays, in an order that neither the number of processes nor a resume changes.

Rows of ``seq_len`` tokens come in one order for all processes, a function of the seed alone. ``size * world`` of them
after one another are the micro-batches of one moment, of which every process takes its ``size``. A batch travels with
the state that continues after it, so that a checkpoint holds what was consumed, however far a thread has read ahead;
between two updates the state is the same in all processes, and any number of them can continue from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.documents import Documents
from lowrank_optim.pretrain.tokenization import encode, encode_starts, frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
State = dict[str, Any]
Tokens = NDArray[Any]


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


class Share(NamedTuple):
    """How many rows of how many tokens a micro-batch of one of ``world`` processes has."""

    seq_len: int
    size: int
    rank: int = 0
    world: int = 1


def shuffled_windows(
    tokens: Tokens, seq_len: int, size: int, rank: int, world: int, seed: int, state: State | None
) -> Iterator[tuple[Batch, State]]:
    """Endless batches of the whole windows of a token array, in a new order every epoch."""
    share = Share(seq_len, size, rank, world)
    for rows, after in shuffled_rows(len(tokens) // seq_len, share, seed, state):
        yield whole_batch(tokens[rows[:, None] * seq_len + np.arange(seq_len)]), after


def ordered_windows(tokens: Tokens, seq_len: int, size: int, rank: int, world: int) -> Iterator[Batch]:
    """Every window of a token array once, the processes taking turns; the last one is padded."""
    for rows in ordered_rows(-(-len(tokens) // seq_len), Share(seq_len, size, rank, world)):
        yield padded_batch([tokens[row * seq_len : (row + 1) * seq_len] for row in rows], seq_len)


def shuffled_rows(
    count: int, share: Share, seed: int, state: State | None
) -> Iterator[tuple[NDArray[np.int64], State]]:
    """Endless row numbers below ``count``, each once an epoch; a batch may begin in one epoch and end in the next."""
    state = state or {"epoch": 0, "row": 0}
    at = state["epoch"] * count + state["row"]
    while True:
        first = at + share.rank * share.size
        rows = np.arange(first, first + share.size)
        for epoch in np.unique(rows // count).tolist():
            inside = rows // count == epoch
            rows[inside] = permuted(rows[inside] % count, count, f"{seed} {epoch}")
        at += share.size * share.world
        yield rows, {"epoch": at // count, "row": at % count}


def ordered_rows(count: int, share: Share) -> Iterator[list[int]]:
    """Every row number below ``count`` once, the processes taking turns."""
    for first in range(share.rank * share.size, count, share.size * share.world):
        yield list(range(first, min(first + share.size, count)))


def permuted(numbers: NDArray[np.int64], count: int, key: str) -> NDArray[np.int64]:
    """Where a random permutation of ``range(count)`` sends some numbers, without memory for the others.

    A Feistel network over the next power of four, walked until it ends below ``count`` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002, method 2).
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    rounds = np.frombuffer(hashlib.blake2b(key.encode()).digest(), dtype="<u8")
    found = numbers.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> bits, found[outside] & mask
        for number in rounds:
            left, right = right, left ^ (_mixed(right + number) & mask)
        found[outside] = left << bits | right
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def whole_batch(rows: Tokens) -> Batch:
    """A batch of rows without padding."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids, ids)


def padded_batch(rows: Sequence[Tokens], seq_len: int, *, pad: int = 0, closing: Sequence[int] = ()) -> Batch:
    """A batch of one document a row, padded or cut at ``seq_len``; a row that is cut ends with ``closing``."""
    # On the right and without an attention mask: causal attention lets no real token see the padding.
    ids = np.full((len(rows), seq_len), pad, dtype=np.int64)
    labels = np.full((len(rows), seq_len), IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row[:seq_len]
        if closing and len(row) > seq_len:
            ids[i, -len(closing) :] = closing
        labels[i, : len(row)] = ids[i, : len(row)]
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def document_batches(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    share: Share,
    vocab_size: int,
    pack: bool,
    state: State | None,
    *,
    partial: bool = False,
) -> Iterator[tuple[Batch, State]]:
    """Batches of documents and the state after each; ``partial`` yields what is left at the end as well.

    The state names a block of documents, how many of its rows are used and the tokens that it began with. What a
    tokenizer itself puts after every text ends a document that is cut as well.
    """
    state = state or {"position": None, "used": 0, "rest": []}
    used, rest = state["used"], np.array(state["rest"], dtype=np.int32)
    together, first = share.size * share.world, share.size * share.rank
    ends: dict[str, Any] = {"pad": tokenizer.pad_token_id or 0, "closing": frame(tokenizer)[1]}
    own: list[Any] = []
    filled = 0

    def batch() -> Batch:
        made = padded_batch(own, share.seq_len, **ends)
        if (largest := int(made.ids.max())) >= vocab_size:
            raise UserError(f"Invalid token id: {largest}, expected less than the model's {vocab_size}")
        return made

    for position, texts in documents.blocks(state["position"]):
        rows: Any
        if pack:
            joined = np.concatenate([rest, *encode(tokenizer, texts)])
            whole = len(joined) - len(joined) % share.seq_len
            rows, tail = joined[:whole].reshape(-1, share.seq_len), joined[whole:]
        else:
            # A document is a row: only those of this process need be encoded.
            mine = [i for i in range(used, len(texts)) if 0 <= (filled + i - used) % together - first < share.size]
            rows, tail = [rest] * len(texts), rest
            for i, row in zip(mine, encode_starts(tokenizer, [texts[i] for i in mine], share.seq_len), strict=True):
                rows[i] = row
        while used < len(rows):
            taken = min(together - filled, len(rows) - used)
            own.extend(rows[used + max(first - filled, 0) : used + max(min(first + share.size - filled, taken), 0)])
            used, filled = used + taken, filled + taken
            if filled == together:
                epoch = position["epoch"]
                yield batch(), {"epoch": epoch, "position": position, "used": used, "rest": rest.tolist()}
                own, filled = [], 0
        used, rest = 0, tail
    if partial:
        if pack and len(rest) > 1 and first <= filled < first + share.size:
            own.append(rest)
        if own:
            yield batch(), {}
