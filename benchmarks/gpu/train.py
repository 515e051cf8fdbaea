"""``train_llama.py`` on given or random token ids: ``python -m benchmarks.gpu.train TOKENS SEED [OPTION ...]``.

TOKENS is a .npy of uint16 ids, whose last part is held out, or "random". Everything else is the script itself, so that
what is measured is what users run; a tokenizer, which is not needed to train, is not there, so it cannot save.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.runner import ROOT

RANDOM = "random"
# Ids below the smallest of the vocabularies.
VOCABULARY, COUNT = 8192, 2_000_000
HELD_OUT = 0.02

Row = dict[str, Any]


def watched(
    line: list[str], folder: Path, *, tokens: Path | None, enough: Callable[[list[Row]], bool], seconds: float
) -> list[Row]:
    """The metrics of a run in a process of its own, which is ended as soon as they are enough or the time is over.

    Raises:
        RuntimeError: the run ended before.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", __name__, str(tokens or RANDOM), *line, "--output-dir", str(folder / "run")]
    ends = time.time() + seconds
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                rows = read_metrics(folder / "run" / "metrics.jsonl")
                if enough(rows) or time.time() > ends:
                    return rows
                if process.poll() is not None:
                    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"train_llama.py ended with {process.returncode}: {text.strip()[-300:]}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
            print((folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:])


def read_metrics(path: Path) -> list[Row]:
    """The rows that are complete."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def token_array(source: str) -> NDArray[np.uint16]:
    """The ids of a file, or random ones.

    Raises:
        ValueError: a file of something else.
    """
    if source == RANDOM:
        return np.random.default_rng(0).integers(VOCABULARY, size=COUNT, dtype=np.uint16)
    tokens: NDArray[np.uint16] = np.load(source)
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"Invalid tokens: {tokens.dtype} of shape {tokens.shape}, expected uint16 of one dimension")
    return tokens


def give_tokens(source: str) -> None:
    """Let the trainer find these tokens whatever data set it asks for."""
    from lowrank_optim.pretrain import batches, data

    tokens = token_array(source)
    held = max(1, int(len(tokens) * HELD_OUT))
    training, validation = tokens[:-held], tokens[-held:]

    def load_data(options: Any, **_: Any) -> data.Data:
        def train(state: batches.State | None) -> Iterator[tuple[batches.Batch, batches.State]]:
            return batches.shuffled_windows(training, options.seq_len, options.batch_size, 0, 1, options.seed, state)

        def held_out() -> Iterator[batches.Batch]:
            return batches.ordered_windows(validation, options.seq_len, options.batch_size, 0, 1)

        none: Any = None
        return data.Data(none, f"{len(training):,} given tokens", source, train, held_out)

    data.load_data = load_data


def main() -> int:
    source, *line = sys.argv[1:]
    give_tokens(source)
    status: int = importlib.import_module("train_llama").main(line)
    return status


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
