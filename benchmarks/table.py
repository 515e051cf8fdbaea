"""The tables of README.md and docs from the measured figures: ``python -m benchmarks.table [--check]``.

Reads ``results/step.json`` (``benchmarks.step``) and ``results/reference.json`` (``benchmarks.reference``) and replaces
what stands between the two markers in README.md. State bytes are computed by :mod:`lowrank_optim.memory`. The other
tables, on other pages too, are those of the modules that it imports; plots need matplotlib.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lowrank_optim
from benchmarks import aot_table, claims, converge_table, launches, memory_7b, parameterizations_table
from benchmarks.common import read_result
from benchmarks.contestants import ARGUMENTS, own_names
from benchmarks.gpu import table as gpu_table
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain.optimizers import accepted_arguments

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table:optimizers -->", "<!-- /table -->"
TIMED, PLANNED, PLANNED_RANK = "llama_60m", "llama_7b", 1024
NONE = "–"
HEADER = (
    "optimizer",
    "state on LLaMA-7B, GB",
    "step / two GEMMs",
    "full-size tensors a step",
    "SVD / refresh",
    "distance to the published trajectory",
)


def table(step: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """The Markdown between the markers.

    Args:
        step: what ``benchmarks.step`` wrote, with figures of llama_60m.
        reference: what ``benchmarks.reference`` wrote, or None.
    """
    figures = step["models"][TIMED]
    methods = figures["methods"]
    errors = reference["errors"] if reference else {}
    rows = [
        [f"`{name}`", _state(name), *_timed(methods.get(name)), _refresh(name, figures), _distance(errors.get(name))]
        for name in own_names()
    ]
    rows.append(["`torch.optim.AdamW`, fused", _state("AdamW"), *_timed(methods.get("torch AdamW fused")), NONE, NONE])
    peers = [name for name in methods if name.split()[0] in ("galore-torch", "apollo-torch", "fira")]
    rows += [[name, NONE, *_timed(methods[name]), NONE, NONE] for name in peers]
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, *rows)]
    return "\n".join([lines[0], f"|---{'|---:' * (len(HEADER) - 1)}|", *lines[1:], "", _caption(step, figures)])


def _state(name: str) -> str:
    # What fixes the rank of a class in the comparison of steps fixes it here too.
    free = "rank" in accepted_arguments(name) and "rank" not in ARGUMENTS.get(name, {})
    args = {"rank": PLANNED_RANK} if free else {}
    job = Job(model=PLANNED, optimizer=name, optimizer_args=args)
    return f"{estimate(job).by_category['optimizer'] / 1e9:.2f}"


def _timed(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return NONE, NONE
    return f"{row['to_floor']:.2f}", f"{row['full_size_temporaries']:.2g}"


def _refresh(name: str, figures: Mapping[str, Any]) -> str:
    """For classes that choose the way of their refresh: the default's."""
    parameter = inspect.signature(getattr(lowrank_optim, name)).parameters.get("refresh")
    kind = figures["refresh"].get(parameter.default) if parameter is not None else None
    return NONE if kind is None else f"{kind['svd_to_this']:.0f}"


def _distance(errors: Mapping[str, float] | None) -> str:
    if not errors:
        return NONE
    return f"{statistics.median(errors.values()):.0e} ({max(errors.values()):.0e})"


def _caption(step: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    machine = step["machine"]
    device = machine.get("accelerator") or f"{machine['threads']} threads of {machine['processor']}"
    setting = f"{TIMED.replace('_', '-')}, rank {figures['rank']}, {figures['dtype']}, {device}"
    return "\n".join(
        (
            f"State: weights in bf16, rank {PLANNED_RANK} where a rank can be chosen.",
            f"Step: between refreshes, the projected matrices of {setting}, torch {step['versions']['torch']};",
            "two GEMMs = project the gradient, back-project into the weight; full-size tensors: created for a matrix.",
            "SVD / refresh: time of the exact SVDs over that of the default refresh.",
            "Distance: difference over displacement, median (and largest) over the authors' trajectories.",
            f"Made by `{step['command']}`, `python -m benchmarks.reference` and `python -m benchmarks.table`.",
        )
    )


def replaced(text: str, new: str, marker: str = BEGIN) -> str:
    """``text`` with ``new`` between ``marker`` and the next :data:`END`.

    Raises:
        ValueError: no markers, or not in this order.
    """
    before, begin, rest = text.partition(marker)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"Invalid page: expected the lines {marker} and {END}")
    return f"{before}{marker}\n{new}\n{END}{after}"


def current() -> str:
    """The table from the figures in ``results``.

    Raises:
        ValueError: steps have not been measured.
    """
    step = read_result("step")
    if step is None or TIMED not in step["models"]:
        raise ValueError(f"Invalid results: no step.json with {TIMED}, run python -m benchmarks.step")
    return table(step, read_result("reference"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a file is out of date")
    options = parser.parse_args(argv)
    try:
        new = replaced(README.read_text(encoding="utf-8"), current())
        for table in (memory_7b, parameterizations_table, converge_table):
            new = replaced(new, table.current(), table.BEGIN)
        pages = {README: new}
        for table in (launches, aot_table, gpu_table, claims):
            page = pages.get(table.PAGE) or table.PAGE.read_text(encoding="utf-8")
            pages[table.PAGE] = replaced(page, table.current(), table.BEGIN)
        page = converge_table.PAGE.read_text(encoding="utf-8")
        pages[converge_table.PAGE] = replaced(page, converge_table.choosing(), converge_table.CHOOSING)
    except ValueError as error:
        raise SystemExit(f"benchmarks.table: error: {error}") from error
    stale = converge_table.stale_plots()
    if options.check and stale:
        raise SystemExit(f"benchmarks.table: error: {stale[0]} is out of date; run python -m benchmarks.table")
    converge_table.draw_plots()
    for path, text in pages.items():
        if not options.check:
            path.write_text(text, encoding="utf-8")
        elif text != path.read_text(encoding="utf-8"):
            raise SystemExit(f"benchmarks.table: error: {path.name} is out of date; run python -m benchmarks.table")


if __name__ == "__main__":
    main()
