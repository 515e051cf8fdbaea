"""Runs the pieces one after the other, each in processes of its own, and ends them at their deadlines."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import record

LOG = "gpu.log"
ROOT = Path(__file__).parents[2]
# Seconds that a process must have to be worth its start.
LEAST = 8.0
# A worker has this long to write its last line before it is killed.
GRACE = 1.5


class Piece(NamedTuple):
    """``seconds`` at most; ``workers`` processes share what is not timed."""

    seconds: int
    about: str
    workers: int = 1


# In the order of what is worth most if the rest is cut off. Those up to "throughput" fit into 540 s.
PIECES = {
    "limits": Piece(25, "versions, copy bandwidth, rates of products, what a launch costs"),
    "compile": Piece(60, "every kernel launched once, so that nothing is compiled where something is timed", 12),
    "check": Piece(50, "every kernel, shape and rounding against fp64", 6),
    "sanitizer": Piece(45, "every kernel at its smallest shape under compute-sanitizer"),
    "memory": Piece(115, "LLaMA-7B with its memory capped to 24, 16 and 12 GB"),
    "kernels": Piece(55, "kernels against cuBLAS, torch's fused AdamW and their byte limit; tiles"),
    "steps": Piece(70, "whole optimizer steps: launched, replayed, on the host, with a refresh"),
    "throughput": Piece(120, "tokens/s and MFU of train_llama.py"),
    "tests": Piece(60, "the tests of the kernels"),
    "peers": Piece(75, "the published packages on one layer of LLaMA-7B"),
    "converge": Piece(160, "losses of LLaMA-60M on given tokens"),
}


class Ended(NamedTuple):
    """How the processes of a piece ended: statuses, and whether some were killed at the deadline."""

    statuses: list[int]
    late: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    record.end_last_line(options.out)
    ends = time.time() + options.budget
    device = device_name()
    for name in [name for name in PIECES if not options.only or name in options.only]:
        if record.WHOLE in record.settled(options.out, name):
            print(f"{name}: done before", flush=True)
        elif ends - time.time() < LEAST:
            record.write(options.out, name, record.WHOLE, device, reason="the budget was over", again=True)
        else:
            run_piece(name, options, ends, device)
    rows = record.read(options.out / record.FILE)
    failed = [row for row in rows if "reason" in row or row.get("right") is False]
    print(f"\n{len(rows)} lines in {options.out / record.FILE}, {len(failed)} of them without a figure or wrong:")
    for row in failed:
        print(f"  {row['piece']}: {row['name']}: {row.get('reason', 'wrong')}"[:300])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure everything that has to be measured on a GPU.",
        epilog="pieces: " + "; ".join(f"{name}: {piece.about}" for name, piece in PIECES.items()),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.jsonl and gpu.log; an old one continues")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which everything is ended")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=[], metavar="PIECE", help="only these pieces")
    parser.add_argument("--tokens", type=Path, help="a .npy of uint16 token ids, for the losses of LLaMA-60M")
    parser.add_argument("--updates", type=int, default=250, help="of each of these training runs")
    return parser.parse_args(argv)


def device_name() -> str:
    """The GPU's name, asked in another process: a context of this one would take memory from the pieces."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run_piece(name: str, options: argparse.Namespace, ends: float, device: str) -> None:
    """Run one piece; where a process of it dies, once again without the figure that it died of."""
    start = time.time()
    # An interpreter takes the time that it takes.
    deadline = ends if device == "cpu" else min(ends, start + PIECES[name].seconds)
    for _ in range(2):
        with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
            ended = run_processes(name, options, deadline, Path(scratch), device)
            for mark in sorted(Path(scratch).glob("running-*")):
                reason = "it was not over at the deadline" if ended.late else f"its process died: {ended.statuses}"
                record.write(options.out, name, mark.read_text(), device, reason=reason, again=ended.late)
        if ended.late or not any(ended.statuses) or deadline - time.time() < LEAST:
            break
    seconds = round(time.time() - start, 1)
    if any(ended.statuses):
        record.write(
            options.out, name, record.WHOLE, device, seconds=seconds, reason=f"cut: {ended.statuses}", again=True
        )
    else:
        record.write(options.out, name, record.WHOLE, device, seconds=seconds)


def run_processes(name: str, options: argparse.Namespace, deadline: float, scratch: Path, device: str) -> Ended:
    """The workers of a piece, until all have ended or the deadline has come."""
    workers = PIECES[name].workers if device != "cpu" else 1
    command = [sys.executable, "-m", "benchmarks.gpu.worker", name, "--out", str(options.out)]
    command += ["--scratch", str(scratch), "--ends", str(deadline - GRACE), "--updates", str(options.updates)]
    command += ["--tokens", str(options.tokens)] if options.tokens else []
    with (options.out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        running = [
            subprocess.Popen(
                [*command, "--share", str(share), "--shares", str(workers), "--parent", str(os.getpid())],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for share in range(workers)
        ]
        try:
            while time.time() < deadline and any(process.poll() is None for process in running):
                time.sleep(0.05)
            late = any(process.poll() is None for process in running)
        finally:
            for process in running:
                end_group(process)
    return Ended([process.returncode for process in running], late)


def environment() -> dict[str, str]:
    """That of a process which imports this checkout, installed or not."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
