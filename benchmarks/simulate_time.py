"""How long ``lowrank-memory simulate`` of LLaMA-7B takes: ``python -m benchmarks.simulate_time [--only NAME ...]``.

Every method and parameterization once, as a process of its own, imports included; low-rank optimizers also with
per-layer updates of 64 micro-batches. Seconds of CPU time tell more than those of the clock where other programs run.
Writes ``results/simulate_time.json`` as it goes; ``--only`` replaces rows of these names alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import read_result, write_result
from lowrank_optim.memory.compare import all_methods
from lowrank_optim.pretrain.optimizers import low_rank_names

SUMMED = ("--per-layer", "--accumulate", "64")


def main(argv: Sequence[str] | None = None) -> None:
    """Time every job."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_time", description=__doc__.partition(":")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="optimizers or parameterizations [all]")
    only = parser.parse_args(argv).only
    before = read_result("simulate_time") or {"rows": []}
    rows = [row for row in before["rows"] if only and row["method"] not in only]
    for optimizer, layers in all_methods():
        method = layers or optimizer
        if only and method not in only:
            continue
        own = layers is None and optimizer in low_rank_names()
        for more in ((), SUMMED) if own else ((),):
            line = ["--optimizer", optimizer, *(["--parameterization", layers] if layers else []), *more]
            rows.append({"method": method, "line": " ".join(line), **timed(["simulate", "--model", "llama_7b", *line])})
            print(rows[-1], flush=True)
            write_result("simulate_time", torch.device("cpu"), {"rows": rows})


def timed(line: Sequence[str]) -> dict[str, Any]:
    """Seconds of the clock and of the CPU that the command takes, and the peak that it finds."""
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_optim.memory", *line, "--json"], capture_output=True, text=True, check=True
    )
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    peak: int = json.loads(done.stdout)["peak_bytes"]
    return {"seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(cpu, 2), "peak_bytes": peak}


if __name__ == "__main__":
    main()
