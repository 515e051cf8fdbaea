"""What becomes of the moments at a refresh, by the loss that a small LLaMA reaches.

    python -m benchmarks.converge [--steps 250] [--gap 25] [--seeds 0 1 2] [--refresh power svd]

trains it with GaLoreAdamW for each of moments="keep", "align" and "rotate", from the same weights and on the same
batches for a seed, and writes ``results/converge.json``: validation losses, and the gain over "keep" seed by seed,
beside its spread. A default other than "keep" needs a mean gain of more than two standard errors.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, training
from lowrank_optim.optim.subspaces.random import MOMENTS
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.steps import evaluate


def run(options: argparse.Namespace, moments: str, refresh: str, seed: int) -> dict[str, Any]:
    """One training run."""
    one = training.prepare(
        Options(
            dataset=options.dataset,
            tokenizer=options.tokenizer,
            model=options.model,
            optimizer="GaLoreAdamW",
            optimizer_args=[f"update_proj_gap={options.gap}", f"moments={moments}", f"refresh={refresh}"],
            lr=options.lr,
            pack=True,
            seed=seed,
            max_steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            grad_clip=1.0,
        )
    )
    losses = [loss for _, loss in one.updates()]
    held_out = evaluate(
        one.model, one.data.validation(), limit=options.eval_batches, legacy=False, device=torch.device("cpu")
    )
    return {
        "moments": moments,
        "refresh": refresh,
        "seed": seed,
        "validation_loss": held_out.loss,
        "train_loss": statistics.fmean(losses[-10:]),
        "run": training.about(one),
    }


def gains(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By refresh and moments: how much lower the validation loss is than with "keep", over the seeds."""
    loss = {(one["refresh"], one["moments"], one["seed"]): one["validation_loss"] for one in runs}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for refresh in dict.fromkeys(one["refresh"] for one in runs):
        seeds = [seed for kind, moments, seed in loss if (kind, moments) == (refresh, "keep")]
        for moments in MOMENTS[1:]:
            by_seed = [loss[refresh, "keep", seed] - loss[refresh, moments, seed] for seed in seeds]
            error = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else math.inf
            mean = statistics.fmean(by_seed)
            found.setdefault(refresh, {})[moments] = {"mean": mean, "standard_error": error}
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.converge", description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default=training.default_dataset(), help="as train_llama.py takes it")
    parser.add_argument("--tokenizer", help="as train_llama.py takes it")
    parser.add_argument("--model", default="llama_9m", help="a preset or a LLaMA config.json")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--gap", type=int, default=25, help="updates between refreshes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--refresh", nargs="+", choices=("power", "randomized", "svd"), default=["power", "svd"])
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-batches", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="converge", help="of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    runs: list[dict[str, Any]] = []
    try:
        for refresh in options.refresh:
            for seed in options.seeds:
                for moments in MOMENTS:
                    runs.append(one := run(options, moments, refresh, seed))
                    print(f"{refresh} seed {seed} {moments:6} {one['validation_loss']:.4f}", flush=True)
                # After every seed: the whole takes half an hour of one core.
                written = write(options.name, runs)
    except (UserError, RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks.converge: error: {error}") from error
    for refresh, by_moments in gains(runs).items():
        for moments, gain in by_moments.items():
            print(f'{refresh}: "{moments}" gains {gain["mean"]:+.4f} over "keep", +- {gain["standard_error"]:.4f}')
    print(written)


def write(name: str, runs: Sequence[dict[str, Any]]) -> Path:
    """The JSON file of the runs so far."""
    rows = [{key: value for key, value in one.items() if key != "run"} for one in runs]
    figures = {"run": runs[0]["run"], "runs": rows, "gain_over_keep": gains(runs)}
    return common.write_result(name, torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
