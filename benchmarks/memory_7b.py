"""Simulated peaks of LLaMA-7B, one sequence of 2048 tokens a micro-batch: ``python -m benchmarks.memory_7b``.

Per-layer updates, checkpointed activations, chunked loss, moments in 8 bits for embeddings and head too. Nothing of the
model's size is allocated; a job takes a few minutes on one core. Writes ``results/memory_7b.json`` as it goes and is
the README's second table of the 7B jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.common import read_result, write_result
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.simulate import simulate

BEGIN = "<!-- table:memory_7b -->"

# Optimizer, its arguments, weights, and the peak in GB that the job is to stay under.
JOBS: list[tuple[str, dict[str, Any], str, float]] = [
    ("GaLoreAdamW8bit", {"rank": 1024}, "bf16", 21.0),
    ("QGaLoreAdamW8bit", {"rank": 1024}, "int8", 13.5),
    ("DCTAdamW", {"rank": 256, "update_proj_gap": 200, "state_dtype": "int8"}, "int8", 10.2),
    ("APOLLOMini", {"state_dtype": "int8"}, "int8", 9.5),
]


def main() -> None:
    """Simulate every job."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for optimizer, args, weights, target in JOBS:
        job = Job(
            model="llama_7b", optimizer=optimizer, optimizer_args=args, weights=weights,
            seq_len=2048, per_layer=True, checkpointing=True,
        )  # fmt: skip
        peak = simulate(job)
        rows.append({"method": job.method, "weights": weights, "target_gb": target, **peak.as_dict()})
        print(f"{job.method}, {weights} weights: {peak.peak_bytes / 1e9:.2f} GB, target {target:g}", flush=True)
        write_result("memory_7b", torch.device("cpu"), {"rows": rows})


def current() -> str:
    """The table from ``results/memory_7b.json``.

    Raises:
        ValueError: it has not been made.
    """
    result = read_result("memory_7b")
    if result is None:
        raise ValueError("Invalid results: no memory_7b.json, run python -m benchmarks.memory_7b")
    parts = ("weights", "optimizer", "gradients", "activations", "other")
    lines = [
        f"| optimizer | weights stored in | peak, GB | {' | '.join(parts)} |",
        f"|---|---|---:{'|---:' * len(parts)}|",
    ]
    for row in result["rows"]:
        sizes = [row["peak_bytes"], *(row["by_category"][part] for part in parts)]
        lines.append(f"| `{row['method']}` | {row['weights']} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |")
    return "\n".join([*lines, "", _caption(result)])


def _caption(result: Mapping[str, Any]) -> str:
    return (
        "Simulated on tensors without data: 1 × 2048 tokens, per-layer updates, checkpointing, chunked loss; "
        "GB = 10⁹ bytes.\n"
        f"Made by `{result['command']}` and `python -m benchmarks.table`."
    )


if __name__ == "__main__":
    main()
