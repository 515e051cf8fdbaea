"""What comparing a checkpoint with its digests adds to loading it: ``python -m benchmarks.digests [--gigabytes 8.9]``.

A checkpoint of LLaMA-7B's size (int8 weights and low-rank states of 8 bits are 8.9 GB), loaded by the trainer's own
:func:`lowrank_optim.pretrain.checkpoint.load_` with and without digests in turn: from the disk, and from the memory in
which the system keeps files. Its tensors are large ones without a model around them. Writes ``results/digests.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from benchmarks.common import markdown, needed_result, spread, write_result
from lowrank_optim.pretrain import checkpoint, manifest
from lowrank_optim.pretrain.random_state import random_state
from lowrank_optim.pretrain.weight_files import WEIGHTS

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN = "<!-- table:digests -->"
SHARE_OF_WEIGHTS = 0.75
TENSOR = 1 << 27


class Loaded:
    """What :func:`checkpoint.load_` loads into: a model, and the states of an optimizer."""

    # Of a run that is spread over processes.
    optimizer = None

    def __init__(self, size: float) -> None:
        self.model = nn.Module()
        for number in range(round(size * SHARE_OF_WEIGHTS / TENSOR)):
            self.model.register_buffer(f"weight_{number}", _random())
        self.number = round(size * (1 - SHARE_OF_WEIGHTS) / TENSOR)
        # All go into the same, so that a small machine has room.
        self.state = _random()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for tensor in saved["states"]:
            self.state.copy_(tensor)


def _random() -> torch.Tensor:
    """Bytes which nothing compresses on the way to the disk."""
    return torch.empty(TENSOR // 8, dtype=torch.int64).random_().view(torch.int8)


def write(folder: Path, loaded: Loaded) -> None:
    save_model(loaded.model, str(folder / WEIGHTS))
    # Copies, because what is shared is saved once.
    torch.save({"states": [loaded.state.clone() for _ in range(loaded.number)]}, folder / "optimizer.pt")
    process = {"random": random_state(), "data": None}
    torch.save([process], folder / "processes.pt")
    state = {"format": checkpoint.FORMAT, "progress": {"step": 1}, "files": manifest.of_folder(folder)}
    state["digest"] = manifest.of_values(state)
    (folder / checkpoint.STATE).write_text(json.dumps(state), encoding="utf-8")


def forget(folder: Path) -> None:
    """Have the files read from the disk the next time."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, loaded: Any, *, digests: bool, cached: bool) -> float:
    """Seconds of one load."""
    if not cached:
        forget(folder)
    began = time.perf_counter()
    checkpoint.load_(folder, loaded, rank=0, digests=digests)
    return time.perf_counter() - began


def digest_rate(folder: Path, size: int) -> float:
    """Bytes a second of all digests alone, of files in memory."""
    began = time.perf_counter()
    assert checkpoint.damage(folder) is None
    return size / (time.perf_counter() - began)


def current() -> str:
    """The table of docs/reliability.md from ``results/digests.json``.

    Raises:
        ValueError: nothing was measured.
    """
    result = needed_result("digests")
    header = ("a checkpoint", "seconds without", "with digests", "more, of a load at 1 GB/s")
    rows = []
    for name in ("from disk", "from memory"):
        row = result[name]
        without, with_ = (row["seconds"][key]["median"] for key in ("without", "with"))
        more = f"{row['share_of_a_load_at_1_GB_per_second']:.1%}"
        rows.append((name, f"{without:.2f}", f"{with_:.2f}", more))
    rate, machine = result["digest_gigabytes_per_second"]["median"], result["machine"]
    caption = (
        f"{result['bytes'] / 1e9:.1f} GB, medians of {row['seconds']['with']['n']}, {machine['cores']} cores of "
        f"{machine['processor']}; digests alone make {rate:.1f} GB/s. Made by `{result['command']}`."
    )
    return f"{markdown(header, rows)}\n\n{caption}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoint is, or is written and stays [a temporary one]")
    options = parser.parse_args(argv)
    loaded = Loaded(options.gigabytes * 1e9)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.folder or place)
        if not (folder / checkpoint.STATE).exists():
            write(folder, loaded)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for cached in (False, True):
            seconds: dict[bool, list[float]] = {False: [], True: []}
            # One with the digests first, which does not count: it leaves the files in memory.
            load(folder, loaded, digests=True, cached=cached)
            for _ in range(options.rounds):
                for digests, taken in seconds.items():
                    taken.append(load(folder, loaded, digests=digests, cached=cached))
            without, with_ = (statistics.median(seconds[digests]) for digests in seconds)
            figures["from memory" if cached else "from disk"] = {
                "seconds": {name: spread(seconds[key]) for name, key in (("without", False), ("with", True))},
                "gigabytes_per_second_without": size / without / 1e9,
                # The seconds more, beside those of a load at 1 GB/s.
                "share_of_a_load_at_1_GB_per_second": (with_ - without) / (size / 1e9),
            }
            print(json.dumps(figures, indent=1), flush=True)
        rates = [digest_rate(folder, size) / 1e9 for _ in range(options.rounds)]
        figures |= {"bytes": size, "digest_gigabytes_per_second": spread(rates)}
    print(write_result("digests", torch.device("cpu"), figures))


if __name__ == "__main__":
    main()
