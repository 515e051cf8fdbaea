"""The gpu suite of ``benchmarks.converge``: LLaMA-60M by the published recipes, in pieces of four minutes.

Every run is one of the trainer's, with its checkpoints in the user's cache: a piece saves when its time is up, and the
next call goes on. A run that has ended becomes a file in ``results/converge/gpu``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common
from lowrank_optim.cli import train
from lowrank_optim.pretrain.cache import cache_root
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.metrics import FILE, read_metrics

# What the trainer returns where its time was up.
PAUSED = 75
# A shorter piece would be spent on starting.
LEAST_MINUTES = 1.0
# Options of the trainer; what is not given is published, see lowrank_optim.pretrain.recipes.
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "AdamW"},
    "GaLore": {"optimizer": "GaLoreAdamW"},
    "Fira": {"optimizer": "FiraAdamW", "lr": 0.01},
    "APOLLO": {"optimizer": "APOLLOAdamW", "lr": 0.01},
    "APOLLO-Mini": {"optimizer": "APOLLOMini", "lr": 0.01},
    "Muon": {"optimizer": "Muon", "lr": 1e-3},
    "DCT": {"optimizer": "DCTAdamW", "lr": 1e-3},
    "FOAM": {"optimizer": "FOAM"},
    "Alice": {"optimizer": "Alice"},
    "RACS": {"optimizer": "RACS"},
    "SCALE": {"optimizer": "SCALE"},
    "low rank": {"parameterization": "lowrank"},
    "SLTrain": {"parameterization": "sltrain"},
    "LOST": {"parameterization": "lost"},
    "CoLA": {"parameterization": "cola"},
    "LORO": {"parameterization": "loro"},
}


class Suite(NamedTuple):
    """What is the same for all; ``tokenizer`` is a folder, None for a byte-level BPE of the data."""

    model: str = "llama_60m"
    dtype: str = "bf16"
    updates: int = 10_000
    batch_size: int | None = None
    seq_len: int | None = None
    tokenizer: str | None = None
    minutes: float = 4.0


def compete(suite: Suite, seeds: Sequence[int], wanted: Sequence[str], data: Path, budget: float) -> None:
    """Pieces until no run is left or ``budget`` seconds are over.

    Raises:
        UserError: the trainer's, or a run that ended otherwise than at its end or in a pause.
    """
    began = time.monotonic()
    for seed in seeds:
        for name in wanted or METHODS:
            path = common.RESULTS / "converge" / "gpu" / f"{name.lower().replace(' ', '-')}_seed{seed}.json"
            while not path.is_file():
                left = min(suite.minutes, (budget - (time.monotonic() - began)) / 60)
                if left < LEAST_MINUTES:
                    return
                options = options_of(suite, name, seed, data, left)
                status = train.run(options)
                if status == 0:
                    _write(path, suite, name, seed, Path(str(options.output_dir)))
                elif status != PAUSED:
                    raise UserError(f"the run of {name} ended with status {status}")


def options_of(suite: Suite, name: str, seed: int, data: Path, minutes: float) -> Options:
    """What the trainer is asked for; the folder depends on everything that the outcome does."""
    about = json.dumps([suite._replace(minutes=0), METHODS[name], seed, data.name])
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    return Options(
        dataset=str(data),
        tokenizer=suite.tokenizer,
        model=suite.model,
        dtype=suite.dtype,
        pack=True,
        seed=seed,
        max_steps=suite.updates,
        warmup_steps=suite.updates // 10,
        batch_size=suite.batch_size,
        seq_len=suite.seq_len,
        eval_every=max(1, suite.updates // 20),
        save_every=suite.updates,
        output_dir=str(cache_root() / "converge" / "gpu" / f"{name.lower().replace(' ', '-')}-{key}"),
        resume="auto",
        max_time=minutes if math.isfinite(minutes) else None,
        sample_tokens=0,
        **METHODS[name],
    )


def _write(path: Path, suite: Suite, name: str, seed: int, run: Path) -> None:
    rows = read_metrics(run / FILE)
    curve = [{"update": row["step"], "loss": row["eval_loss"]} for row in rows if "eval_loss" in row]
    made = [row for row in rows if "peak_memory_bytes" in row]
    figures: Mapping[str, Any] = {
        "method": name,
        "seed": seed,
        "suite": suite._asdict(),
        "options": METHODS[name],
        "loss": curve[-1]["loss"],
        "curve": curve,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in made),
        "tokens_per_second": made[-1]["tokens_per_second"],
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common.write_result(f"converge/gpu/{path.stem}", device, figures)
