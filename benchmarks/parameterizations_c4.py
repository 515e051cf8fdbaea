"""A small LLaMA on C4 text: LowRank, SLTrain and LOST of one rank, trained alike.

    python -m benchmarks.parameterizations_c4 --data ../shared/data/c4_sample/en \\
        --tokenizer ../shared/data/tokenizers/t5-base [--steps 150] [--lr 3e-3]

The shards are C4's own (``*train*.json.gz`` and ``*validation*.json.gz`` of lines with a ``text``). All runs see
the same batches of packed windows; each starts from the same embeddings, head and norms. Writes
``results/parameterizations_c4.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import write_result
from lowrank_optim.nn import LOST, LowRank, Parameterization, SLTrain, convert
from lowrank_optim.pretrain.llama import build_config, build_model


def contestants(rank: int) -> dict[str, Parameterization]:
    """SLTrain's alpha is a quarter of the rank, as published for 60M."""
    return {
        "low rank": LowRank(rank),
        "sltrain": SLTrain(rank, sparsity=0.03, alpha=rank / 4),
        "lost": LOST(rank),
    }


def tokens_of(folder: Path, split: str, tokenizer: Any, limit: int) -> Tensor:
    """The first ``limit`` tokens of a split, documents ended by the tokenizer's end of text."""
    found: list[int] = []
    for path in sorted(folder.glob(f"*{split}*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                found += tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]
                if len(found) >= limit:
                    return torch.tensor(found[:limit])
    raise ValueError(f"Invalid data: {folder} holds {len(found)} {split} tokens, expected at least {limit}")


def batches(tokens: Tensor, size: int, length: int, count: int) -> Iterator[Tensor]:
    """``count`` batches (size, length) of windows in a fixed random order, again from the start when used up."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for step in range(count):
        yield windows[order[torch.arange(step * size, (step + 1) * size) % len(order)]]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(options: Any, parameterization: Parameterization, text: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train one contestant; its losses and sizes."""
    torch.manual_seed(0)
    model = build_model(build_config(options.model))
    convert(model, parameterization)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    warmup = max(1, options.steps // 10)

    def factor(step: int) -> float:
        share = (step - warmup) / max(1, options.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * share)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for ids in batches(text, options.batch_size, options.seq_len, options.steps):
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        windows = held_out.view(-1, options.batch_size, options.seq_len)
        held = [float(loss_of(model, ids)) for ids in windows]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss": sum(held) / len(held),
        "last_train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "train_loss": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    window = options.batch_size * options.seq_len
    text = tokens_of(options.data, "train", tokenizer, options.steps * window)
    held_out = tokens_of(options.data, "validation", tokenizer, 10 * window)
    runs = {}
    for name, parameterization in contestants(options.rank).items():
        runs[name] = train(options, parameterization, text, held_out)
        print(
            f"{name:10} {runs[name]['parameters']:>11,} parameters   validation loss "
            f"{runs[name]['validation_loss']:.4f}   training loss, last 10 {runs[name]['last_train_loss']:.4f}",
            flush=True,
        )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    for key in ("data", "tokenizer"):
        settings[key] = Path(settings[key]).name
    print(write_result("parameterizations_c4", torch.device("cpu"), {"settings": settings, "runs": runs}))


if __name__ == "__main__":
    main()
