"""Kernels and the steps built of them: ``python -m benchmarks.kernels --check --time``.

``--check`` holds every kernel against fp64, relative to the error of the eager operation, and whole optimizers against
eager ones; on a GPU at the sizes of LLaMA-1B and 7B, with CUDA graphs, elsewhere in Triton's interpreter at tiny sizes.
``--time`` needs a GPU: medians of every kernel and its eager twin against the time that a copy of as many bytes, or a
product of as many FLOPs, takes on this device; then whole steps on a decoder layer of LLaMA-7B. It writes
``results/GPU.json`` and prints tables. Together they take less than 8 minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import common
from benchmarks.kernel_cases import SIZES, TINY, Case, cases
from benchmarks.kernel_steps import (
    ADAMW,
    METHODS,
    RANKS,
    Limit,
    adamw_row,
    distance,
    replay_distance,
    step_row,
    targets,
)
from benchmarks.triton_interpreter import mend_bfloat16

T = TypeVar("T")

# After so many seconds nothing further is timed.
BUDGET = 420
STEP_MODEL = "llama_7b"
# Of two ways to order the same fp32 sums over a few steps, relative to the way that the weights went.
STEP_TOLERANCE = 1e-3


def fail(message: str) -> SystemExit:
    return SystemExit(f"benchmarks.kernels: error: {message}")


def interpret() -> None:
    """Run kernels in Triton's interpreter, however small the operands are; before anything imports triton."""
    # What is decorated without it, in triton itself too, never runs in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    mend_bfloat16()
    importlib.import_module("lowrank_kernels.gram").SYMMETRIC_FROM = 1  # type: ignore[attr-defined]


def error_ratio(case: Case) -> float:
    """The greatest of the errors of a kernel's results over twice the eager one's; at most 1 is right.

    An absolute part of 1e-6 of a result makes room for those that eager rounds by luck to nothing. Codes may differ
    from eager ones in one place of a thousand, where a value lies between two.
    """
    worst = 0.0
    found = (case.results("triton"), case.results("eager"), case.results("eager", exact=True))
    for ours, theirs, exact in zip(*found, strict=True):
        if not exact.is_floating_point():
            worst = max(worst, 1e3 * float((ours != theirs).double().mean()))
            continue
        error, allowed = ((result.double() - exact).norm() for result in (ours, theirs))
        worst = max(worst, float(error / (2 * allowed + 1e-6 * exact.norm())))
    return worst


def attempt(what: str, run: Callable[[], T]) -> T | None:
    """The result; None, and a line that says why, where one kernel or optimizer fails and others may not."""
    try:
        return run()
    except Exception as error:
        print(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None


def check(device: torch.device) -> list[dict[str, Any]]:
    """A row a check: what, how far, and whether that is right."""
    rows: list[dict[str, Any]] = []

    def add(what: str, run: Callable[[], float], allowed: float) -> None:
        value = attempt(what, run)
        # Not value > allowed: a NaN is wrong too.
        rows.append(
            {"check": what, "value": value, "allowed": allowed, "right": value is not None and value <= allowed}
        )

    for name, size in (SIZES if device.type == "cuda" else {"tiny": TINY}).items():
        for case in cases(size, device):
            add(f"{case.name}, {name}", partial(error_ratio, case), 1.0)
    for method in METHODS:
        add(f"{method}, triton against eager", partial(distance, method, device), STEP_TOLERANCE)
    if device.type == "cuda":
        for method in METHODS:
            add(f"{method}, replayed against eager", partial(replay_distance, method, device), 0.0)
    return rows


def median_ms(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=25, rep=100, return_mode="median"))


def measured_limit(device: torch.device) -> Limit:
    """Bandwidth of copying 1 GiB, both ways counted, and rate of a bf16 product of side 8192."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Limit(2 * 2**30 / copy_ms * 1e3, 2 * side**3 / median_ms(lambda: a @ b) * 1e3)


def kernel_row(case: Case, model: str, limit: Limit) -> dict[str, Any]:
    ours, eager = (median_ms(case.bound(backend)) for backend in ("triton", "eager"))
    least = limit.milliseconds(case.moved, case.flops)
    return {
        "kernel": case.name, "model": model, "ms": ours, "eager_ms": eager, "limit_ms": least,
        "share": least / ours, "eager_share": least / eager,
    }  # fmt: skip


def measure(device: torch.device, ends: float) -> dict[str, Any]:
    """All figures that are ready before the time is over."""
    limit = measured_limit(device)
    tasks: dict[str, Iterator[tuple[str, Callable[[], dict[str, Any]]]]] = {
        "kernels": (
            (f"{case.name}, {model}", partial(kernel_row, case, model, limit))
            for model, size in SIZES.items()
            for case in cases(size, device)
        ),
        "adamw": ((name, partial(adamw_row, name, STEP_MODEL, device, median_ms)) for name in ADAMW),
        "steps": (
            (f"{method}, rank {rank}", partial(step_row, STEP_MODEL, method, rank, backend, device, limit, median_ms))
            for rank in RANKS
            for method in METHODS
            for backend in ("triton", "eager")
        ),
    }
    figures: dict[str, Any] = {"limit": limit._asdict()}
    for kind, rows in tasks.items():
        figures[kind] = []
        for what, run in rows:
            if time.perf_counter() > ends:
                print(f"{what} was not measured: {BUDGET} s are over")
                continue
            row = attempt(what, run)
            figures[kind] += [row] if row is not None else []
    figures["targets"] = targets(figures["adamw"], figures["steps"])
    return figures


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows that all have the same keys."""
    if not rows:
        return ""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="hold every kernel against fp64 and eager")
    parser.add_argument("--time", action="store_true", help="measure kernels and steps on the GPU")
    parser.add_argument("--json", type=Path, help="write the figures here instead of results/GPU.json")
    options = parser.parse_args(argv)
    ends = time.perf_counter() + BUDGET
    if not (options.check or options.time):
        parser.error("expected --check, --time or both")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.time and device.type != "cuda":
        raise fail("--time needs a CUDA device, and there is none")
    try:
        if device.type != "cuda":
            interpret()
        import triton
    except ImportError as error:
        raise fail(f"needs triton: {error}") from error
    torch.manual_seed(0)
    print(f"{common.machine(device).get('accelerator', 'Triton interpreter')}, triton {triton.__version__}\n")
    figures: dict[str, Any] = {}
    if options.check:
        figures["checks"] = check(device)
        print(f"{markdown(figures['checks'])}\n")
    if options.time:
        figures |= measure(device, ends)
        print("\n\n".join(markdown(figures[kind]) for kind in ("kernels", "adamw", "steps", "targets")))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    elif device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
        print(f"\nwritten: {common.write_result(name, device, figures)}")
    wrong = [row["check"] for row in figures.get("checks", []) if not row["right"]]
    if wrong:
        raise fail(f"wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
