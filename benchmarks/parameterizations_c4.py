"""A small LLaMA on the bytes of C4 text: every parameterization of one rank, each at its best learning rate.

    python -m benchmarks.parameterizations_c4 --data ../shared/data/c4_sample/en [--steps 200] [--seeds 0 1]

The shards are C4's own (``*train*.json.gz`` and ``*validation*.json.gz`` of lines with a ``text``). A byte is a
token, so that the parameterized matrices, not the embeddings, hold most of the model. All runs see the same windows
in the same order and start from the same embeddings, head and norms. Runs as short as these show how fast a start
learns, not where it ends: the dense model is behind too. The learning rate of a contestant is one of
``--lr`` whose neighbours have a higher validation loss for the first seed. Writes
``results/parameterizations_c4.json``, contestant by contestant; those that it holds for the same settings are not run
again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import read_result, write_result
from lowrank_optim.pretrain.llama import build_config, build_model
from lowrank_optim.pretrain.optimizers import build_optimizer
from lowrank_optim.pretrain.parameterizations import build_restarts, layer_spec, parameterize_
from lowrank_optim.pretrain.schedule import build_schedule

# Two starts of the same factors; the better of the two is the baseline of all others.
BASELINES = ("low rank", "low rank, kaiming")
# Several restarts, samples and steps on the manifold in a run of a few hundred updates; published: 200 to 1000.
PERIOD = 50


class Contestant(NamedTuple):
    """A parameterization by name, None for dense matrices, with what it was published with."""

    parameterization: str | None
    args: Mapping[str, Any] = {}
    optimizer: str = "AdamW"
    optimizer_args: Mapping[str, Any] = {}
    restarts: str = "none"
    restart_args: Mapping[str, Any] = {}


def contestants(rank: int) -> dict[str, Contestant]:
    """All of them by name; SLTrain's and LoRA's alpha are a quarter of the rank, as published for 60M."""
    low, gap = {"rank": rank}, {"update_proj_gap": PERIOD}
    kaiming = {**low, "alpha": rank / 4, "init": "kaiming"}
    restarts = {"every": PERIOD, "ramp": 5}
    return {
        BASELINES[0]: Contestant("lowrank", low),
        BASELINES[1]: Contestant("lowrank", kaiming),
        "low rank, restarts": Contestant("lowrank", kaiming, restarts="refactorize", restart_args=restarts),
        "sltrain": Contestant("sltrain", {**low, "sparsity": 0.03, "alpha": rank / 4}),
        "lost": Contestant("lost", low),
        "cola": Contestant("cola", low),
        "sst": Contestant("sst", low, "SSTAdamW", gap),
        "lora": Contestant("lora", {**low, "alpha": rank / 4}),
        "relora": Contestant("relora", {**low, "alpha": rank / 4}, restarts="merge", restart_args=restarts),
        "loro": Contestant("loro", low, "LOROAdamW", gap, "reset", restarts),
        "dense": Contestant(None),
    }


def bytes_of(folder: Path, split: str, limit: int) -> Tensor:
    """The first ``limit`` bytes of the documents of a split, each ended by a zero."""
    found = bytearray()
    for path in sorted(folder.glob(f"*{split}*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                found += json.loads(line)["text"].encode() + b"\0"
                if len(found) >= limit:
                    return torch.frombuffer(found[:limit], dtype=torch.uint8)
    raise ValueError(f"Invalid data: {folder} holds {len(found)} {split} bytes, expected at least {limit}")


def batches(text: Tensor, size: int, length: int) -> Iterator[Tensor]:
    """Every window of ``length`` bytes once, in a fixed random order, ``size`` at a time."""
    windows = text[: len(text) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(order), size):
        yield windows[order[start : start + size]].long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(options: argparse.Namespace, contestant: Contestant, lr: float, seed: int, text: Tensor) -> nn.Module:
    """One run over ``text``."""
    torch.manual_seed(seed)
    model = build_model(build_config(options.model, vocab_size=256))
    if contestant.parameterization is not None:
        parameterize_(model, layer_spec(contestant.parameterization, contestant.args), seed=seed)
    optimizer = build_optimizer(contestant.optimizer, model, lr=lr, weight_decay=0.0, args=contestant.optimizer_args)
    warmup = options.steps // 10
    schedule = build_schedule(optimizer, warmup=warmup, total=options.steps)
    restarts = build_restarts(contestant.restarts, contestant.restart_args, model, optimizer, first=warmup, seed=seed)
    for step, ids in enumerate(batches(text, options.batch_size, options.seq_len), start=1):
        loss_of(model, ids).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for restart in restarts:
            restart.after_step(step)
        optimizer.zero_grad()
    return model


@torch.no_grad()
def evaluate(options: argparse.Namespace, model: nn.Module, text: Tensor) -> float:
    """Mean loss a byte; NaN for a run that diverged."""
    model.eval()
    return statistics.mean(float(loss_of(model, ids)) for ids in batches(text, options.batch_size, options.seq_len))


def compete(options: argparse.Namespace, contestant: Contestant, text: Tensor, held_out: Tensor) -> dict[str, Any]:
    """The losses of one contestant: with the first seed at a few rates, then at the best of them with the others."""
    grid: dict[float, float] = {}
    at, trained = options.lr.index(options.start), 0
    while True:
        # Downhill on the ladder, until both neighbours are worse.
        near = options.lr[max(at - 1, 0) : at + 2]
        for lr in near:
            if lr not in grid:
                model = train(options, contestant, lr, options.seeds[0], text)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                loss = evaluate(options, model, held_out)
                grid[lr] = loss if math.isfinite(loss) else math.inf
        best = min(near, key=grid.__getitem__)
        if best == options.lr[at]:
            break
        at = options.lr.index(best)
    losses = [grid[best]]
    for seed in options.seeds[1:]:
        losses.append(evaluate(options, train(options, contestant, best, seed, text), held_out))
    return {
        "parameters": trained,
        "lr": best,
        "losses_by_lr": {str(lr): round(grid[lr], 4) for lr in sorted(grid)},
        "validation_losses": [round(loss, 4) for loss in losses],
        "validation_loss": round(statistics.mean(losses), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--start", type=float, default=3e-3, help="the one of --lr to try first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--afresh", action="store_true", help="also what was measured with the same settings")
    options = parser.parse_args()
    window = options.batch_size * options.seq_len
    text = bytes_of(options.data, "train", options.steps * window)
    held_out = bytes_of(options.data, "validation", 40 * window)
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "afresh")}
    before = read_result("parameterizations_c4") or {}
    known = before["runs"] if before.get("settings") == settings and not options.afresh else {}
    runs: dict[str, Any] = {}
    for name, contestant in contestants(options.rank).items():
        row = runs[name] = known.pop(name, None) or compete(options, contestant, text, held_out)
        write_result("parameterizations_c4", torch.device("cpu"), {"settings": settings, "runs": {**runs, **known}})
        print(
            f"{name:18} {row['parameters']:>9,} trained   lr {row['lr']:<6g} validation loss "
            f"{row['validation_loss']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
