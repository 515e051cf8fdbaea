"""Tokens/s and MFU of ``train_llama.py`` on random tokens, ours beside torch's fused AdamW, compiled and not."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.limits import limit_of
from benchmarks.gpu.record import OutOfTimeError, Task
from benchmarks.gpu.setting import Setting, tiny_model
from benchmarks.gpu.train import Row, watched
from lowrank_optim.pretrain.llama import PRESETS, Shape
from lowrank_optim.pretrain.report import peak_flops

# Updates that do not count, and those that do.
WARMUP, COUNTED = 4, 8
ADAMW = ("AdamW", "fused=True")


class Run(NamedTuple):
    """One run of the trainer: an optimizer with its arguments, sequences and tokens of a micro-batch."""

    model: str
    optimizer: tuple[str, ...]
    batch_size: int
    seq_len: int
    options: tuple[str, ...] = ()
    compile: bool = False

    @property
    def name(self) -> str:
        return f"{Path(self.model).stem}, {' '.join(self.optimizer)}{', compiled' if self.compile else ''}"


# 7B with AdamW takes 54 GB of weights, gradients and moments in bf16, and no updates within the backward pass.
RUNS = [
    *(Run("llama_60m", one, 128, 256) for one in (ADAMW, ("GaLoreAdamW", "rank=128"))),
    *(Run("llama_1b", one, 32, 256) for one in (ADAMW, ("GaLoreAdamW", "rank=512"))),
    Run("llama_7b", ADAMW, 4, 2048, ("--checkpointing",)),
    Run("llama_7b", ("GaLoreAdamW8bit", "rank=1024"), 4, 2048, ("--checkpointing", "--per-layer")),
    *(Run("llama_60m", one, 128, 256, compile=True) for one in (ADAMW, ("GaLoreAdamW", "rank=128"))),
    *(Run("llama_1b", one, 32, 256, compile=True) for one in (ADAMW, ("GaLoreAdamW", "rank=512"))),
    Run("llama_60m", ("FiraAdamW", "rank=128"), 128, 256),
    Run("llama_60m", ("APOLLOAdamW", "rank=128"), 128, 256),
    Run("llama_1b", ("FiraAdamW", "rank=512"), 32, 256),
    Run("llama_1b", ("APOLLOAdamW", "rank=512"), 32, 256),
]


def tasks(setting: Setting) -> list[Task]:
    runs = RUNS if setting.cuda else [Run(tiny_model(setting.scratch), ("GaLoreAdamW", "rank=8"), 2, 16)]
    return [Task(run.name, partial(measured, setting, run)) for run in runs]


def command(run: Run) -> list[str]:
    optimizer, *arguments = run.optimizer
    line = ["--model", run.model, "--optimizer", optimizer, "--optimizer-args", *arguments, "--dtype", "bf16"]
    line += ["--batch-size", str(run.batch_size), "--seq-len", str(run.seq_len), "--eval-batches", "1"]
    # A run that is ended in its middle: its schedule and its checkpoints do not matter.
    line += ["--max-steps", "1000", "--lr", "1e-4", "--eval-every", "0", "--save-every", "0", "--grad-clip", "1.0"]
    return [*line, *run.options, *["--compile"] * run.compile]


def measured(setting: Setting, run: Run) -> dict[str, Any]:
    need = WARMUP + COUNTED if setting.cuda else 2

    def rates(rows: list[Row]) -> list[float]:
        return [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]

    folder = setting.scratch / run.name.replace(" ", "_")
    rows = watched(
        command(run), folder, tokens=None, enough=lambda rows: len(rates(rows)) >= need, seconds=setting.left() - 2
    )
    counted = rates(rows)[WARMUP if setting.cuda else 1 :]
    if not counted:
        raise OutOfTimeError(f"only {len(rates(rows))} updates were made in the time that was left")
    tokens_s = statistics.median(counted)
    figures = {"model": Path(run.model).stem, "optimizer": " ".join(run.optimizer), "compiled": run.compile}
    figures |= {"tokens_s": tokens_s, "updates": len(counted), "tokens_an_update": run.batch_size * run.seq_len}
    figures |= {"seq_len": run.seq_len, "loss": next((row["loss"] for row in reversed(rows) if "loss" in row), None)}
    if run.model not in PRESETS:
        return figures
    flops = tokens_s * flops_per_token(PRESETS[run.model], run.seq_len)
    limit, peak = limit_of(setting.figures("limits")), peak_flops(setting.device, "bf16")
    figures["mfu"] = flops / peak if peak else None
    figures["share_of_measured_product"] = flops / limit.flops if limit else None
    return figures


def flops_per_token(shape: Shape, seq_len: int) -> float:
    """Forward and backward: 6 for each weight that multiplies, and causal attention; nothing that is computed twice."""
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    return 6.0 * (shape.layers * (layer + shape.hidden * seq_len) + shape.vocab * shape.hidden)
