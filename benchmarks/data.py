"""How many tokens a second training can be given, from text and from token shards.

    python -m benchmarks.data --data ../shared/data/c4_sample/en --tokenizer ../shared/data/tokenizers/t5-base

Micro-batches as a run gets them, nothing else at work: read, tokenized, cut and made tensors. Padding does not count.
Writes ``results/data.json``; beside the rate of the clock stands that of processor time, of all threads together, which
other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import spread, write_result
from lowrank_optim.cli.main import main as lowrank_train
from lowrank_optim.pretrain.batches import Batch
from lowrank_optim.pretrain.config import Options
from lowrank_optim.pretrain.data import load_data
from lowrank_optim.pretrain.recipes import resolve


def batches(dataset: str, tokenizer: str, *, pack: bool, size: int, seq_len: int) -> Iterator[tuple[Batch, Any]]:
    """The micro-batches of a run of llama_60m."""
    options = Options(
        dataset=dataset, tokenizer=tokenizer, model="llama_60m", pack=pack, batch_size=size, seq_len=seq_len
    )
    return load_data(resolve(options, hidden_size=512, processes=1), vocab_size=32_000).train(None)


def measure(dataset: str, options: argparse.Namespace, *, pack: bool, tokens: int) -> dict[str, Any]:
    """Tokens a second over the first ``tokens`` of a run, several times.

    From the first batch on, because text is tokenized in blocks of documents, of which most batches only take a part.
    """
    clock, processor = [], []
    for _ in range(options.rounds):
        stream = batches(dataset, options.tokenizer, pack=pack, size=options.batch_size, seq_len=options.seq_len)
        began, used, count = time.perf_counter(), time.process_time(), 0
        while count < tokens:
            batch, _ = next(stream)
            count += int((batch.labels != -100).sum())
        clock.append(count / (time.perf_counter() - began))
        processor.append(count / (time.process_time() - used))
    return {"tokens_per_second": spread(clock), "tokens_per_processor_second": spread(processor)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder or file of text")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=1_200_000, help="tokens a round, from text")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens a round, from token shards")
    options = parser.parse_args(argv)
    rates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = str(Path(folder) / "tokens")
        line = ["tokenize", "--dataset", options.data, "--tokenizer", options.tokenizer, "--output-dir", shards]
        if lowrank_train(line):
            raise SystemExit(2)
        for (kind, source, tokens), pack in itertools.product(
            (("text", options.data, options.text_tokens), ("token shards", shards, options.tokens)), (True, False)
        ):
            name = f"{kind}, {'packed' if pack else 'cut and padded'}"
            rates[name] = found = measure(source, options, pack=pack, tokens=tokens)
            by_clock, by_processor = (found[key]["median"] for key in found)
            print(f"{name:30} {by_clock:>12,.0f} tokens/s {by_processor:>12,.0f} a processor second", flush=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "tokenizer")}
    write_result("data", torch.device("cpu"), {"settings": settings, "rates": rates})


if __name__ == "__main__":
    main()
