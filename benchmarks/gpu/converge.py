"""Losses of LLaMA-60M on given tokens with ``train_llama.py``, by optimizer, from the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu.record import OutOfTimeError, Task
from benchmarks.gpu.setting import Setting, tiny_model
from benchmarks.gpu.train import Row, watched

EVERY = 50
# Updates between two refreshes.
GAP = 200


class Run(NamedTuple):
    """An optimizer, its arguments and its published peak learning rate at this size."""

    optimizer: str
    arguments: tuple[str, ...]
    lr: float


RUNS = [
    Run("AdamW", ("fused=True",), 1e-3),
    Run("GaLoreAdamW", ("rank=128", "scale=0.25"), 1e-2),
    Run("FiraAdamW", ("rank=128", "alpha=0.25"), 1e-2),
    Run("APOLLOAdamW", ("rank=128",), 1e-2),
    Run("DCTAdamW", ("rank=128",), 1e-2),
]


def tasks(setting: Setting) -> list[Task]:
    if setting.tokens is None:
        return [Task("all runs", lambda: {"reason": "no --tokens were given"})]
    runs = RUNS if setting.cuda else RUNS[1:2]
    return [Task(f"{run.optimizer}, {setting.updates} updates", partial(measured, setting, run)) for run in runs]


def command(setting: Setting, run: Run) -> list[str]:
    model, batch_size, seq_len = ("llama_60m", 128, 256) if setting.cuda else (tiny_model(setting.scratch), 2, 16)
    arguments = list(run.arguments) if setting.cuda else ["rank=8"]
    if run.optimizer in ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW"):
        arguments.append(f"update_proj_gap={GAP}")
    line = ["--model", model, "--dtype", "bf16", "--batch-size", str(batch_size), "--seq-len", str(seq_len)]
    line += ["--optimizer", run.optimizer, "--optimizer-args", *arguments, "--lr", str(run.lr), "--grad-clip", "1.0"]
    line += ["--max-steps", str(setting.updates), "--eval-every", str(EVERY), "--eval-batches", "8"]
    return [*line, "--save-every", "0", "--weight-decay", "0"]


def measured(setting: Setting, run: Run) -> dict[str, Any]:
    """Validation losses every 50 updates."""

    def evaluated(rows: list[Row]) -> dict[int, float]:
        return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}

    rows = watched(
        command(setting, run), setting.scratch / run.optimizer, tokens=setting.tokens,
        enough=lambda rows: setting.updates in evaluated(rows), seconds=setting.left() - 2,
    )  # fmt: skip
    losses = evaluated(rows)
    if setting.updates not in losses:
        raise OutOfTimeError(f"{max(losses, default=0)} of {setting.updates} updates were made: {losses}")
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    figures = {"optimizer": run.optimizer, "arguments": list(run.arguments), "lr": run.lr, "updates": setting.updates}
    return {**figures, "losses": losses, "loss": losses[setting.updates], "tokens_s": sorted(rates)[len(rates) // 2]}
