"""The loss of a small LLaMA whose matrices are trained in 8 and in 4 bits: ``python -m benchmarks.low_bit_weights``.

Every run starts from the same weights and sees the same batches; only how the attention and MLP matrices are stored
differs. Writes ``results/low_bit_weights.json`` after every run: training losses over 50 updates, and the loss on held
out text at the end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, training
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.steps import evaluate

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN = "<!-- table:low_bit_weights -->"
# Updates that a training loss is the mean of.
WINDOW = 50


def current() -> str:
    """The table from the figures in ``results``."""
    figures = common.needed_result("low_bit_weights")
    runs, about = figures["runs"], figures["run"]
    every = len(runs[0]["train_losses"]) // 4
    header = (
        "weights in",
        "seed",
        *(f"update {WINDOW * every * quarter:,}" for quarter in range(1, 5)),
        "on held-out text",
    )
    rows = [
        [
            run["weights"],
            str(run["seed"]),
            *(f"{run['train_losses'][every * quarter - 1]:.3f}" for quarter in range(1, 5)),
            f"{run['validation_loss']:.3f}",
        ]
        for run in runs
    ]
    return "\n".join(
        (
            common.markdown(header, rows),
            "",
            f"Losses of {about['model']} with {about['optimizer']}, {about['tokens_an_update']:,} tokens an update; in "
            f"training the mean of {WINDOW} updates.",
            f"Made by `{figures['command']}` and `python -m benchmarks.table`.",
        )
    )


def run(options: argparse.Namespace, weights: str, seed: int) -> dict[str, Any]:
    """One training run."""
    one = training.prepare(
        Options(
            dataset=training.default_dataset(),
            model=options.model,
            weights=None if weights == "fp32" else weights,
            optimizer=options.optimizer,
            optimizer_args=options.optimizer_args,
            lr=options.lr,
            pack=True,
            seed=seed,
            max_steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            grad_clip=1.0,
        )
    )
    losses = []
    for step, loss in one.updates():
        losses.append(loss)
        if step % WINDOW == 0:
            print(f"{weights} seed {seed} update {step}: {statistics.fmean(losses[-WINDOW:]):.4f}", flush=True)
    held_out = evaluate(
        one.model, one.data.validation(), limit=options.eval_batches, legacy=False, device=torch.device("cpu")
    )
    return {
        "weights": weights,
        "seed": seed,
        "validation_loss": held_out.loss,
        "train_losses": [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)],
        "run": {**training.about(one), "optimizer": options.optimizer, "optimizer_args": options.optimizer_args},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_bit_weights", description=__doc__.partition(":")[0])
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--model", default="llama_9m", help="a preset or a LLaMA config.json")
    parser.add_argument("--optimizer", default="APOLLOMini")
    parser.add_argument("--optimizer-args", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-batches", type=int, default=80)
    parser.add_argument("--name", default="low_bit_weights", help="of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    try:
        for seed in options.seeds:
            for weights in options.weights:
                runs.append(one := run(options, weights, seed))
                print(f"{weights} seed {seed}: validation {one['validation_loss']:.4f}", flush=True)
                rows = [{key: value for key, value in some.items() if key != "run"} for some in runs]
                common.write_result(options.name, torch.device("cpu"), {"run": runs[0]["run"], "runs": rows})
    except (UserError, RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks.low_bit_weights: error: {error}") from error


if __name__ == "__main__":
    main()
