"""The peak of a training job that really runs: a process of its own, the same training step, the device's own figures.

``python -m lowrank_optim.memory.measure`` is that process: it takes a job as JSON and answers with JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowrank_optim.memory.estimate import CATEGORIES
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.materialize import materialize, random_batches
from lowrank_optim.pretrain.build import optimizer_for, settle
from lowrank_optim.pretrain.optimizers import parse_optimizer_args
from lowrank_optim.pretrain.report import resident
from lowrank_optim.pretrain.sizes import tensor_bytes
from lowrank_optim.pretrain.update import Updater

# glibc returns what is freed only where a block has its own mapping; otherwise its heap would be measured.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "0",
    # Threads that wait by spinning make an update several times slower where other programs want the cores too.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_MODEL, _OPTIMIZER = "model.pt", "optimizer.pt"


@dataclass(frozen=True)
class Measured:
    """The memory and time that a run took.

    Attributes:
        peak_bytes: largest bytes allocated on a GPU; on the CPU, largest resident memory, less that of the libraries.
        by_category: bytes of the tensors of model and optimizer after the last update; the rest of the peak, which
            cannot be told apart from outside, is under "other".
        losses: of the updates.
        seconds: of the updates.
        weight_sum: sum of all weights after the last update, to compare two runs.
        device: its name.
    """

    peak_bytes: int
    by_category: dict[str, int]
    losses: list[float]
    seconds: list[float]
    weight_sum: float
    device: str


def measure(job: Job, *, updates: int = 3, device: str = "cpu", checkpoint: str | None = None) -> list[Measured]:
    """Run ``updates`` updates of random weights on random tokens in a process of its own.

    Args:
        job: what is trained.
        updates: number of updates, >= 1.
        device: "cpu" or "cuda".
        checkpoint: a folder for a checkpoint after these updates. The run then makes one update more, and a second
            process, whose figures are the second of the result, makes the same update from the checkpoint.

    Raises:
        RuntimeError: the process failed; its own message is on stderr.
    """
    tasks: list[dict[str, Any]] = [{"job": job.as_dict(), "updates": updates, "device": device, "save": checkpoint}]
    if checkpoint is not None:
        tasks.append({**tasks[0], "save": None, "load": checkpoint})
    return [_in_a_process(task) for task in tasks]


def _in_a_process(task: Mapping[str, Any]) -> Measured:
    command = [sys.executable, "-m", "lowrank_optim.memory.measure", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The measured run ended with status {done.returncode}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run(job: Job, *, updates: int, device: str, save: str | None = None, load: str | None = None) -> Measured:
    """The run itself, in this process; see :func:`measure`."""
    if device == "cpu":
        _warm_up(job)
    meter = _Meter(device)
    update = prepare(job, device)
    if load is not None:
        _load_(Path(load), update)
        _say(f"resumed from {load} after {updates} updates")
    losses, seconds = [], []
    for number in range(updates if load else 0, updates + bool(save or load)):
        torch.manual_seed(number)
        start = time.perf_counter()
        losses.append(train_on_noise(update))
        seconds.append(time.perf_counter() - start)
        _say(f"update {number + 1}: loss {losses[-1]:.6f}, {seconds[-1]:.1f} s, peak {meter.peak() / 1e9:.3f} GB")
        if save is not None and number + 1 == updates:
            _say(f"saved {_save(Path(save), update) / 1e9:.3f} GB to {save}")
    sizes = tensor_bytes(update.model, update.optimizer)
    peak = meter.peak()
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_category["weights"], by_category["optimizer"] = sizes["weights"], sum(sizes["optimizer"].values())
    by_category["other"] = peak - sum(by_category.values())
    total = sum(tensor.sum(dtype=torch.float64).item() for tensor in update.model.state_dict().values())
    return Measured(peak, by_category, losses, seconds, total, meter.name)


def prepare(job: Job, device: str) -> Updater:
    """A job with random weights, ready for its first update."""
    settled, config = settle(job)
    model = materialize(settled, config, device)
    return Updater(settled, model, optimizer_for(settled, model))


def train_on_noise(update: Updater) -> float:
    """One update from random tokens; its loss."""
    batches = random_batches(update.run, update.model.config.vocab_size, update.model.device)
    return update(batches, sum(batch.targets for batch in batches)).loss


class _Meter:
    """The largest memory of the device since now."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self.name = torch.cuda.get_device_name(device) if self.on_gpu else "cpu"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        gc.collect()
        _trim()
        # Sets the largest resident memory to the present one.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.on_gpu else resident("VmHWM")) - self.before


def _warm_up(job: Job) -> None:
    """One update of a small model, after which the code of the libraries is in memory."""
    args = {k: min(v, 32) if k == "rank" else v for k, v in parse_optimizer_args(job.optimizer_args).items()}
    small = replace(job, model="llama_9m", optimizer_args=args, seq_len=16, batch_size=1)
    train_on_noise(prepare(small, "cpu"))


def _trim() -> None:
    # glibc's alone.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _save(folder: Path, update: Updater) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(update.model.state_dict(), folder / _MODEL)
    torch.save(update.state_dict(), folder / _OPTIMIZER)
    return sum((folder / name).stat().st_size for name in (_MODEL, _OPTIMIZER))


def _load_(folder: Path, update: Updater) -> None:
    # Mapped files: a tensor is read when it is copied, so the checkpoint is never in memory beside the model.
    update.model.load_state_dict(torch.load(folder / _MODEL, mmap=True, weights_only=True))
    update.load_state_dict(torch.load(folder / _OPTIMIZER, mmap=True, weights_only=True))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(asdict(run(Job(**task.pop("job")), **task))))
