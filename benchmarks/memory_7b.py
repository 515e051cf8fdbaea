"""Simulated peaks of LLaMA-7B and 13B, one sequence of 2048 tokens a micro-batch: ``python -m benchmarks.memory_7b``.

Per-layer updates, checkpointed activations, chunked loss, moments in 8 bits for embeddings and head too. Nothing of the
model's size is allocated; a job takes a few minutes on one core. Writes ``results/memory_7b.json`` as it goes, where
``--weights int4`` replaces the rows of these weights alone, and the table of docs/memory.md is drawn from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import markdown, needed_result, read_result, write_result
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.simulate import simulate

BEGIN = "<!-- table:memory_7b -->"

CAPTION = (
    "Simulated on tensors without data: 1 × 2048 tokens, per-layer updates, checkpointing, chunked loss; "
    "GB = 10⁹ bytes.\n"
    "Made by `python -m benchmarks.memory_7b` and `python -m benchmarks.table`."
)

# Model, optimizer, its arguments, weights, and the peak in GB that the job is to stay under.
JOBS: list[tuple[str, str, dict[str, Any], str, float]] = [
    ("llama_7b", "GaLoreAdamW8bit", {"rank": 1024}, "bf16", 21.0),
    ("llama_7b", "QGaLoreAdamW8bit", {"rank": 1024}, "int8", 13.5),
    ("llama_7b", "DCTAdamW", {"rank": 256, "update_proj_gap": 200, "state_dtype": "int8"}, "int8", 10.2),
    ("llama_7b", "APOLLOMini", {"state_dtype": "int8"}, "int8", 9.5),
    ("llama_7b", "APOLLOMini", {"state_dtype": "int4"}, "int4", 6.0),
    ("llama_13b", "APOLLOMini", {"state_dtype": "int4"}, "int4", 10.0),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate every job."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_7b", description=__doc__.partition(":")[0])
    parser.add_argument("--weights", choices=("bf16", "int8", "int4"), help="only the jobs with these")
    only = parser.parse_args(argv).weights
    torch.set_num_threads(1)
    before = read_result("memory_7b") or {"rows": []}
    rows: list[dict[str, Any]] = [row for row in before["rows"] if only not in (None, row["weights"])]
    for model, optimizer, args, weights, target in JOBS:
        if only not in (None, weights):
            continue
        job = Job(
            model=model, optimizer=optimizer, optimizer_args=args, weights=weights,
            seq_len=2048, per_layer=True, checkpointing=True,
        )  # fmt: skip
        peak = simulate(job)
        rows.append({"model": model, "method": job.method, "weights": weights, "target_gb": target, **asdict(peak)})
        print(
            f"{model}, {job.method}, {weights} weights: {peak.peak_bytes / 1e9:.2f} GB, target {target:g}", flush=True
        )
        write_result("memory_7b", torch.device("cpu"), {"rows": rows})


def current() -> str:
    """The table from ``results/memory_7b.json``.

    Raises:
        ValueError: it has not been made.
    """
    result = needed_result("memory_7b")
    parts = ("weights", "optimizer", "gradients", "activations", "other")
    header = ["model", "optimizer", "weights stored in", "peak, GB", *parts]
    rows = []
    for row in result["rows"]:
        sizes = [row["peak_bytes"], *(row["by_category"][part] for part in parts)]
        model = row["model"].removeprefix("llama_").upper()
        rows.append([model, f"`{row['method']}`", row["weights"], *(f"{size / 1e9:.2f}" for size in sizes)])
    return f"{markdown(header, rows, range(3, len(header)))}\n\n{CAPTION}"


if __name__ == "__main__":
    main()
