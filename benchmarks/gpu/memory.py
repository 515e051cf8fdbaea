"""LLaMA-7B and 13B on cards of 24 to 8 GB: the whole job with its memory capped, beside what was simulated."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import read_result
from benchmarks.gpu.record import OutOfTimeError, Task
from benchmarks.gpu.setting import Setting, tiny_model
from benchmarks.memory_7b import JOBS
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import run
from lowrank_optim.memory.simulate import simulate

# GB of the card that each of the jobs is made for.
CARDS = (24, 16, 12, 12, 8, 12)
UPDATES = 5
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def tasks(setting: Setting) -> list[Task]:
    how: dict[str, Any] = {"per_layer": True, "checkpointing": True}
    if setting.cuda:
        how |= {"seq_len": 2048}
        jobs = [
            Job(model=model, optimizer=name, optimizer_args=args, weights=weights, **how)
            for model, name, args, weights, _ in JOBS
        ]
    else:
        how |= {"model": tiny_model(setting.scratch), "seq_len": 16}
        jobs = [Job(optimizer="GaLoreAdamW8bit", optimizer_args={"rank": 8}, weights="bf16", **how)]
    found = []
    for job, card in zip(jobs, CARDS):
        name = f"{Path(job.model).stem}, {job.method}, {job.weights} weights, {card} GB"
        found.append(Task(name, partial(capped, setting, job, card)))
    return found


def capped(setting: Setting, job: Job, card: int) -> dict[str, Any]:
    """The job in a process that may take ``card`` GB, context included; where fragments do not leave it enough, again
    with segments that can grow."""
    task = {"job": job.as_dict(), "card": card, "device": setting.device.type}
    try:
        figures = in_a_process(task, {}, setting.left())
    except MemoryError as error:
        figures = in_a_process(task, EXPANDABLE, setting.left())
        figures["without_expandable_segments"] = str(error)
    return {"method": job.method, "weights": job.weights, "card_gb": card, **simulated(job), **figures}


def in_a_process(task: Mapping[str, Any], environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """What :func:`main` answers.

    Raises:
        MemoryError: the job does not fit.
        OutOfTimeError: it was not over in time.
        RuntimeError: it failed for another reason.
    """
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=max(1.0, seconds),
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OutOfTimeError(f"the job was not over after {seconds:.0f} s") from error
    print(done.stderr[-4000:])
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-1:])[:300]
        raise (MemoryError if "OutOfMemoryError" in done.stderr else RuntimeError)(last)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def simulated(job: Job) -> dict[str, Any]:
    """The simulated peak as it has been recorded: for LLaMA-7B it takes minutes."""
    recorded = (read_result("memory_7b") or {"rows": []})["rows"]
    wanted = (job.model, job.method, job.weights)
    peaks = [row["peak_bytes"] for row in recorded if (row["model"], row["method"], row["weights"]) == wanted]
    return {"simulated_bytes": peaks[0]} if peaks else {}


def main() -> None:
    """The process of one job."""
    task = json.loads(sys.argv[1])
    job, device = Job(**task["job"]), task["device"]
    figures: dict[str, Any] = {}
    if device == "cuda":
        context = _context()
        total = torch.cuda.get_device_properties(0).total_memory
        cap = task["card"] * 1e9 - context
        torch.cuda.set_per_process_memory_fraction(cap / total)
        figures = {"context_bytes": context, "cap_bytes": cap}
    else:
        torch.set_num_threads(1)
        figures = {"simulated_bytes": simulate(job).peak_bytes}
    found = run(job, updates=UPDATES if device == "cuda" else 2, device=device)
    if device == "cuda":
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
        # Modules that were loaded meanwhile are part of the context.
        figures["process_bytes"] = figures["reserved_bytes"] + _context()
    tokens = job.accumulate * job.batch_size * job.seq_len
    figures |= {
        "allocated_bytes": found.peak_bytes,
        "by_category": dict(found.by_category),
        "losses": found.losses,
        "seconds": found.seconds,
        # The first update compiles and refreshes.
        "tokens_s": tokens / statistics.median(found.seconds[1:]),
    }
    print(json.dumps(figures))


def _context() -> int:
    """Bytes of the device that are taken but not by torch's allocator, on a device that nobody else uses."""
    torch.empty(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


if __name__ == "__main__":
    main()
