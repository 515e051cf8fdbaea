"""Text as token ids on disk: a folder that ``--dataset`` takes like text, and that needs neither reading nor encoding.

``train.bin`` and ``validation.bin`` hold the ids of all documents one after the other, in uint16 or uint32;
``train.idx`` and ``validation.idx`` where each document ends, in int64; ``tokens.json`` what they were made of; the
tokenizer lies beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.documents import Documents
from lowrank_optim.pretrain.tokenization import encode, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "tokens.json"
PROGRESS = "progress.json"
FORMAT = 1
SPLITS = ("train", "validation")
ENDS = np.dtype("<i8")


class TokenSplit(NamedTuple):
    """The ids of all documents, and where each of them ends."""

    tokens: NDArray[Any]
    ends: NDArray[np.int64]

    def document(self, number: int) -> NDArray[Any]:
        return self.tokens[self.ends[number - 1] if number else 0 : self.ends[number]]

    def lengths(self, most: int) -> list[int]:
        """Tokens of the first documents."""
        return np.diff(self.ends[:most], prepend=0).tolist()  # type: ignore[no-any-return]


def is_token_folder(dataset: str) -> bool:
    """Whether a data set was written by :func:`write_tokens`."""
    return (Path(dataset) / MANIFEST).is_file()


def read_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenSplit, TokenSplit]:
    """The training and the validation split, as memory maps.

    Raises:
        UserError: a file is missing or not what ``tokens.json`` says, or another tokenizer made it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"Invalid dataset: {folder} has the format {manifest['format']!r}, expected {FORMAT}")
        if manifest["tokenizer"] != fingerprint(tokenizer):
            raise UserError(f"Invalid tokenizer: {folder} was made with another one, which lies in it")
        dtype = np.dtype(manifest["dtype"])
        training, held_out = (
            TokenSplit(
                _mapped(folder / f"{split}.bin", dtype, manifest[split]["tokens"]),
                _mapped(folder / f"{split}.idx", ENDS, manifest[split]["documents"]),
            )
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Broken dataset: {folder} ({error})") from error
    return training, held_out


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, expected {count * dtype.itemsize:,}")
    return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)


def write_tokens(
    folder: Path,
    splits: Mapping[str, Documents],
    tokenizer: PreTrainedTokenizerBase,
    source: Mapping[str, Any],
    *,
    changed: bool = False,
    limit: int | None = None,
    said: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Any]:
    """Encode the documents of both splits into ``folder``, which is complete or absent; returns its manifest.

    It must not exist. What a broken-off call has written stays in ``folder.partial``, where the next one continues.

    Args:
        folder: where to.
        splits: documents of "train" and "validation".
        tokenizer: encodes them.
        source: what they are, for the manifest.
        changed: continue although what was begun has another source.
        limit: stop after so many training tokens.
        said: is told how many tokens came in.

    Raises:
        UserError: what was begun is something else, or the text cannot be read.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    made: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": fingerprint(tokenizer),
        "source": json.loads(json.dumps(source)),
        **{split: {"tokens": 0, "documents": 0} for split in SPLITS},
    }
    partial = partial_folder(folder)
    if begun := read_progress(partial):
        if any(begun[key] != made[key] for key in ("format", "dtype", "tokenizer", *([] if changed else ["source"]))):
            raise UserError(
                f"Cannot continue {partial}: it was begun with another text or tokenizer; remove it to begin anew, or "
                "go on with the changed text with --allow-changed-data"
            )
        made = {**begun, "source": made["source"]}
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)
    for split in SPLITS:
        if not made[split].get("complete"):
            _write_split(partial, split, splits[split], tokenizer, made, limit if split == "train" else None, said)
            made[split] = {"tokens": made[split]["tokens"], "documents": made[split]["documents"], "complete": True}
    (partial / MANIFEST).write_text(json.dumps(made, indent=1), encoding="utf-8")
    (partial / PROGRESS).unlink(missing_ok=True)
    os.rename(partial, folder)
    return made


def partial_folder(folder: Path) -> Path:
    """Where what becomes ``folder`` is written."""
    return folder.with_name(folder.name + ".partial")


def read_progress(partial: Path) -> dict[str, Any] | None:
    """What a broken-off call had done, None where there was none."""
    try:
        begun: dict[str, Any] = json.loads((partial / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return begun


def _write_split(
    partial: Path,
    split: str,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    made: dict[str, Any],
    limit: int | None,
    said: Callable[[int], object],
) -> None:
    about, dtype = made[split], np.dtype(made["dtype"])
    with (partial / f"{split}.bin").open("ab") as ids, (partial / f"{split}.idx").open("ab") as ends:
        # What came in after the last note of progress comes in again.
        ids.truncate(about["tokens"] * dtype.itemsize)
        ends.truncate(about["documents"] * ENDS.itemsize)
        for position, texts in documents.blocks(about.get("position")):
            if limit is not None and about["tokens"] >= limit:
                break
            ids.flush()
            ends.flush()
            about["position"] = position
            noted = partial / f".{PROGRESS}"
            noted.write_text(json.dumps(made), encoding="utf-8")
            os.replace(noted, partial / PROGRESS)
            rows = encode(tokenizer, texts)
            lengths = np.array([len(row) for row in rows], dtype=ENDS)
            ids.write(np.concatenate(rows).astype(dtype).tobytes())
            ends.write((about["tokens"] + np.cumsum(lengths)).astype(ENDS).tobytes())
            about["tokens"] += int(lengths.sum())
            about["documents"] += len(rows)
            said(int(lengths.sum()))
