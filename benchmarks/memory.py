"""Simulated against measured peaks on this machine: ``python -m benchmarks.memory``.

Every optimizer on small LLaMAs; each measurement is a process of its own. Writes ``results/memory_MODEL.json`` as it
goes; do not change the code meanwhile, or the two peaks of a row are not of the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common import write_result
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import measure
from lowrank_optim.memory.published import RANKS
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.optimizers import accepted_arguments, low_rank_names


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama_60m", "llama_130m"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", *low_rank_names()])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--per-layer", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in options.models:
        rows: list[dict[str, Any]] = []
        for dtype in options.dtypes:
            for name in options.optimizers:
                row = _row(model, dtype, name, options, device)
                rows.append(row)
                print(f"{model} {dtype} {name}: simulate / measure {row['ratio']:.3f}", flush=True)
                write_result(f"memory_{model}", torch.device(device), {"rows": rows})


def _row(model: str, dtype: str, name: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    given: dict[str, Any] = {"rank": RANKS[model], "update_proj_gap": 2}
    args = {key: value for key, value in given.items() if key in accepted_arguments(name)}
    if name == "APOLLOMini":
        del args["rank"]
    job = Job(
        model=model, optimizer=name, optimizer_args=args,
        dtype=dtype, seq_len=options.seq_len, per_layer=options.per_layer,
    )  # fmt: skip
    peak, run = simulate(job), measure(job, device=device)[0]
    return {
        "model": model,
        "method": job.method,
        "setting": job.setting,
        "simulated_bytes": peak.peak_bytes,
        "measured_bytes": run.peak_bytes,
        "ratio": peak.peak_bytes / run.peak_bytes,
        "where": f"{peak.phase} of {peak.layer} ({peak.update})",
        "by_category": peak.by_category,
    }


if __name__ == "__main__":
    main()
