"""Who trains best at what memory: ``python -m benchmarks.converge --suite NAME [--budget MINUTES] [--only NAME ...]``.

All methods of ``benchmarks.methods`` train one model from the same weights on the same batches in the same order
(for a seed). Every run is a file in ``results/converge/SUITE``, written when it ends; runs that exist are left out, so
that the command goes on where it stopped, and several of them can run at a time. First AdamW tries rates for
embeddings, head and vectors, which are then the same for all; then everyone tries the rates of its ladder with the
first seed, the main methods before the others; then the best rate is run with the other seeds. The cpu-long suite
trains six times as long and begins each ladder at the best rate of the cpu suite. The gpu suite is that of
``benchmarks.converge_gpu``.
``python -m benchmarks.table`` draws what there is.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import importlib
import json
import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

import lowrank_optim
from benchmarks import common, converge_gpu
from benchmarks.baselines import PEERS
from benchmarks.converge_runs import SUITES, Run, Suite, config_of, digest, folder, pending, pilot_rates, results
from benchmarks.methods import METHODS
from lowrank_optim.pretrain.batches import ordered_windows, shuffled_windows
from lowrank_optim.pretrain.build import build_network, restarts_for, settle
from lowrank_optim.pretrain.cache import cache_root
from lowrank_optim.pretrain.config import Options, Resolved, UserError
from lowrank_optim.pretrain.steps import evaluate
from lowrank_optim.pretrain.tokenization import encode, train_bpe
from lowrank_optim.pretrain.update import Updater

DATA = Path(__file__).parents[2] / "shared" / "data"
TRAIN, VALIDATION = "web_wiki/en/*train*.json.gz", "c4_sample/en/*validation*.json.gz"
# What a hidden matrix, dense or in factors, has in its name in transformers' LLaMA.
HIDDEN = "_proj."
# Stands for a loss that is not finite.
DIVERGED = 99.0


class Tokens(NamedTuple):
    """Token ids of the text, and their digest."""

    train: NDArray[np.uint16]
    validation: NDArray[np.uint16]
    digest: str


def load_tokens(suite: Suite, data: Path) -> Tokens:
    """The tokens of a suite by a byte-pair tokenizer of its vocabulary, kept in the user's cache.

    Raises:
        UserError: too little text.
    """
    files = [path for pattern in (TRAIN, VALIDATION) for path in sorted(data.glob(pattern))]
    about = [[path.name, path.stat().st_size] for path in files]
    key = digest({"files": about, "tokens": suite.tokens, "of": suite.evaluated, "vocab": suite.shape["vocab_size"]})
    kept = cache_root() / "converge" / f"{key}.npz"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = train_bpe(islice(_texts(data, TRAIN), 1000), suite.shape["vocab_size"])
        train = _encoded(tokenizer, _texts(data, TRAIN), suite.tokens)
        validation = _encoded(tokenizer, _texts(data, VALIDATION), suite.evaluated)
        part = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, train=train, validation=validation)
        part.rename(kept)
    with np.load(kept) as arrays:
        train, validation = arrays["train"], arrays["validation"]
    return Tokens(train, validation, hashlib.sha256(train.tobytes() + validation.tobytes()).hexdigest()[:12])


def _texts(data: Path, pattern: str) -> Iterator[str]:
    for path in sorted(data.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def _encoded(tokenizer: Any, texts: Iterator[str], count: int) -> NDArray[np.uint16]:
    rows: list[NDArray[np.int32]] = []
    have = 0
    while have < count:
        documents = list(islice(texts, 64))
        if not documents:
            raise UserError(f"Invalid data: {have} tokens, expected at least {count}; see --data")
        rows += encode(tokenizer, documents)
        have = sum(map(len, rows))
    return np.concatenate(rows)[:count].astype(np.uint16)


def build(suite: Suite, run: Run) -> tuple[Resolved, nn.Module, Optimizer]:
    """Model and optimizer of a run, with a rate of their own for embeddings, head and vectors."""
    from transformers import LlamaConfig

    method = run.method
    options = Options(
        model="converge",
        seed=run.seed,
        lr=run.lr,
        weight_decay=0.0,
        grad_clip=1.0,
        seq_len=suite.seq_len,
        batch_size=suite.batch_size,
        max_steps=suite.updates,
        warmup_steps=suite.updates // 10,
        weights=method.weights,
        optimizer=method.optimizer,
        parameterization=method.parameterization,
        parameterization_args=_pairs(suite.filled(method.parameterization_args, run.rest)),
        restarts=method.restarts,
        restart_args=_pairs(suite.filled(method.restart_args, run.rest)),
    )
    # The trainer does not know the published packages.
    known = method.optimizer not in PEERS
    config = LlamaConfig(**suite.shape, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=False)
    settled, config = settle(options if known else _dense(options), config=config)
    model = build_network(settled, config, "cpu")
    return settled, model, _optimizer(suite, run, model)


def _dense(options: Options) -> Options:
    options.optimizer = "AdamW"
    return options


def _pairs(args: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in args.items()]


def _optimizer(suite: Suite, run: Run, model: nn.Module) -> Optimizer:
    method, rest, args = run.method, run.rest, suite.filled(run.method.args, run.rest)
    optimizer: Optimizer
    if method.optimizer in PEERS:
        module, name, keys, arguments = PEERS[method.optimizer]
        low = {**keys, "rank": keys["rank"] or suite.rank, "update_proj_gap": suite.gap}
        cls = getattr(importlib.import_module(module), name)
        optimizer = cls(_by_name(model, rest, **low), lr=run.lr, eps=1e-8, **arguments, **args)
        return optimizer
    if method.optimizer == "AdamW":
        return torch.optim.AdamW(_by_name(model, rest), lr=run.lr, weight_decay=0.0, **args)
    if method.optimizer == "AdamW8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(_by_name(model, rest), lr=run.lr, weight_decay=0.0, **args)
        return optimizer
    if method.optimizer == "LOROAdamW":
        groups = lowrank_optim.factor_groups(model)
    elif method.optimizer == "SSTAdamW":
        groups = lowrank_optim.spectral_groups(model)
    else:
        groups = lowrank_optim.low_rank_groups(model, rank=args.pop("rank", 1))
    if "adamw_lr" not in args:
        groups[-1]["lr"] = rest
    optimizer = getattr(lowrank_optim, method.optimizer)(groups, lr=run.lr, weight_decay=0.0, **args)
    return optimizer


def _by_name(model: nn.Module, rest: float, **low: Any) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if HIDDEN in name], **low},
        {"params": [p for name, p in named if HIDDEN not in name], "lr": rest},
    ]


def train(suite: Suite, run: Run, tokens: Tokens) -> dict[str, Any]:
    """One run: losses on held-out text at 1/32, 1/16, ... of the tokens, bytes, and seconds of the processor."""
    device = torch.device("cpu")
    settled, model, optimizer = build(suite, run)
    restarts = restarts_for(settled, model, optimizer)
    update = Updater(settled, model, optimizer, restarts=restarts)
    stream = shuffled_windows(tokens.train, suite.seq_len, suite.batch_size, 0, 1, run.seed, None)
    stops = {max(1, suite.updates >> k) for k in range(6)}
    curve: list[dict[str, float]] = []
    made: list[float] = []
    seconds = 0.0
    for step in range(1, suite.updates + 1):
        batch, _ = next(stream)
        began = time.process_time()
        one = update([batch], batch.targets)
        for restart in restarts:
            restart.after_step(step)
        seconds += time.process_time() - began
        made.append(one.loss)
        if step in stops:
            held_out = ordered_windows(tokens.validation, suite.seq_len, suite.batch_size, 0, 1)
            loss = evaluate(model, held_out, limit=0, legacy=False, device=device).loss
            at = step * suite.batch_size * suite.seq_len
            curve.append({"tokens": at, "loss": round(loss, 5), "train_loss": round(float(np.mean(made[-16:])), 5)})
            if not math.isfinite(loss):
                break
    last = curve[-1]["loss"]
    return {
        "loss": last if math.isfinite(last) else DIVERGED,
        "curve": curve,
        "bytes": _bytes(model, optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cpu_seconds": round(seconds, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of weights and of optimizer state, of the whole model and of what the hidden matrices consist of."""
    hidden = {name: value for name, value in model.state_dict(keep_vars=True).items() if HIDDEN in name}
    parameters = [*model.parameters()]
    states = [state for p, state in optimizer.state.items() if any(p is value for value in hidden.values())]
    return {
        "weights": common.held_bytes([*model.state_dict().values()]),
        "state": common.held_bytes(optimizer.state, exclude=parameters),
        "hidden_weights": common.held_bytes([value.detach() for value in hidden.values()]),
        "hidden_state": common.held_bytes(states, exclude=parameters),
    }


@contextmanager
def claimed(suite: Suite, run: Run) -> Iterator[bool]:
    """Whether no other process makes this run; the system forgets a claim with the process that held it."""
    path = cache_root() / "converge" / f"{suite.name}-{run.file}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def write(suite: Suite, run: Run, tokens: Tokens, row: Mapping[str, Any]) -> Path:
    """The file of a run that has ended, in one rename."""
    config = config_of(suite, run)
    result = {
        "method": run.method.name,
        "lr": run.lr,
        "seed": run.seed,
        "config_hash": digest(config),
        "data": tokens.digest,
        **row,
        "config": config,
        "command": f"python -m benchmarks.converge {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": common.machine(torch.device("cpu")),
        "versions": common.versions(),
    }
    path = folder(suite) / run.file
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.rename(path)
    return path


def compete(suite: Suite, seeds: Sequence[int], wanted: Sequence[str], data: Path, budget: float) -> None:
    """Make runs until none is left or ``budget`` seconds are over; the one under way ends first."""
    began = time.monotonic()
    tokens = load_tokens(suite, data)
    while True:
        for run in pending(seeds, results(suite), wanted, pilot_rates(suite)):
            if time.monotonic() - began >= budget:
                return
            with claimed(suite, run) as mine:
                if mine and run.key not in results(suite):
                    row = train(suite, run, tokens)
                    write(suite, run, tokens, row)
                    print(f"{run.file:60} {row['loss']:.4f} {row['cpu_seconds']:.0f} s", flush=True)
                    break
        else:
            return


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.converge", description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", choices=(*SUITES, "gpu"), required=True)
    parser.add_argument("--budget", type=float, default=math.inf, metavar="MINUTES", help="start no run after this")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rates")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with web_wiki and c4_sample")
    parser.add_argument("--diagnose", action="store_true", help="look at gradients instead, see benchmarks.diagnose")
    options = parser.parse_args(argv)
    known = METHODS if options.suite in SUITES else converge_gpu.METHODS
    for name in options.only:
        if name not in known:
            parser.error(f"Invalid method: {name!r}, expected one of {', '.join(known)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    try:
        if options.diagnose:
            from benchmarks.diagnose import diagnose

            print(diagnose(options.data))
        elif options.suite == "gpu":
            tokenizer = options.data / "tokenizers" / "t5-base"
            suite = converge_gpu.Suite(tokenizer=str(tokenizer) if tokenizer.is_dir() else None)
            text = options.data / "web_wiki"
            converge_gpu.compete(suite, options.seeds, options.only, text, options.budget * 60)
        else:
            compete(SUITES[options.suite], options.seeds, options.only, options.data, options.budget * 60)
    except (UserError, RuntimeError, ValueError, ImportError) as error:
        raise SystemExit(f"benchmarks.converge: error: {error}") from error


if __name__ == "__main__":
    main()
