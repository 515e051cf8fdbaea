"""The embedded corpus: the text of the Python standard library, encoded once and cached."""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowrank_optim.pretrain.cache import cache_root, write_folder
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.tokenization import BPE_VOCAB, encode, fingerprint, train_bpe, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.unsignedinteger[Any]]
# Tests are a third of the library, encodings are tables of characters; what is installed beside the library
# differs between machines.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
# One file in 16 is held out, by the hash of its name.
VALIDATION_SHARE = 16
FILES_PER_BATCH = 32


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    train: Tokens
    validation: Tokens
    fingerprint: str


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The ``.py`` files of the running Python's standard library, sorted."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return sorted(path for path in found if path.is_file())


def load_stdlib(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, *, show: bool, root: Path | None = None
) -> Corpus:
    """The corpus, from the cache where this Python and tokenizer have been seen before.

    Args:
        tokenizer: None trains a byte-level BPE on the corpus.
        vocab_size: upper limit of that BPE's size.
        show: display progress.
        root: another folder of ``.py`` files, for tests.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names, texts = [], []
    digest = hashlib.sha256()
    for path in stdlib_files(root):
        names.append(path.relative_to(root).as_posix())
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        digest.update(f"{names[-1]}\0{texts[-1]}\0".encode("utf-8", errors="replace"))
    held = [hashlib.sha256(name.encode()).digest()[0] % VALIDATION_SHARE == 0 for name in names]
    if not any(held) or all(held):
        raise UserError(f"The standard library in {root} has too few .py files to train on ({len(names)})")
    pieces = min(vocab_size, BPE_VOCAB)
    digest.update((fingerprint(tokenizer) if tokenizer else f"bpe-{pieces}").encode())
    key = digest.hexdigest()[:16]
    folder = cache_root() / f"stdlib-{platform.python_version()}-{key}"
    if not folder.is_dir():
        train = [text for text, out in zip(texts, held) if not out]
        trained = tokenizer or train_bpe(_progress(train, "training the tokenizer", show), pieces)
        splits = {
            "train": _encode(trained, train, "encoding the corpus", show),
            "validation": _encode(trained, [text for text, out in zip(texts, held) if out], "", False),
        }

        def fill(into: Path) -> None:
            if tokenizer is None:
                serialized = trained.backend_tokenizer.to_str()
                (into / "bpe.json").write_text(serialized, encoding="utf-8")
            for split, tokens in splits.items():
                np.save(into / f"{split}.npy", tokens)

        try:
            write_folder(folder, fill)
        except OSError as error:
            # Another process may have been faster; a cache that cannot be written costs half a minute a run.
            if not folder.is_dir():
                print(f"warning: cannot cache the corpus in {folder} ({error})", file=sys.stderr)
                return Corpus(trained, splits["train"], splits["validation"], key)
    loaded = tokenizer or wrap((folder / "bpe.json").read_text(encoding="utf-8"))
    return Corpus(loaded, np.load(folder / "train.npy"), np.load(folder / "validation.npy"), key)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], what: str, show: bool) -> Tokens:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    starts = range(0, len(texts), FILES_PER_BATCH)
    return np.concatenate(
        [
            row.astype(dtype)
            for start in _progress(starts, what, show)
            for row in encode(tokenizer, texts[start : start + FILES_PER_BATCH])
        ]
    )


def _progress(items: Any, what: str, show: bool) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(items, desc=what, disable=not show, mininterval=0.5, leave=False)
