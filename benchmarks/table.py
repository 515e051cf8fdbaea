"""The tables of README.md and docs/ from the measured figures: ``python -m benchmarks.table [--check]``.

Replaces what stands between the markers of each table in :data:`TABLES`. The one of all optimizers is made here, from
``results/step.json`` (``benchmarks.step``) and ``results/reference.json`` (``benchmarks.reference``); its state bytes
are computed by :mod:`lowrank_optim.memory`. The others are those of the modules that this one imports.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lowrank_optim
from benchmarks import (
    aot_table,
    chaos_table,
    claims,
    converge_table,
    digests,
    distributed_table,
    elastic,
    front_table,
    launches,
    low_bit_weights,
    memory_7b,
    parameterizations_table,
    scaling,
    state_bytes,
)
from benchmarks.baselines import ARGUMENTS, own_names
from benchmarks.common import markdown, read_result
from benchmarks.gpu import table as gpu_table
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain.build import DTYPES
from lowrank_optim.pretrain.optimizers import accepted_arguments

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
BEGIN, END = "<!-- table:optimizers -->", "<!-- /table -->"
TIMED, PLANNED, PLANNED_RANK = "llama_60m", "llama_7b", 1024
NONE = "–"
HEADER = (
    "optimizer",
    "state on LLaMA-7B, GB",
    "state, bytes a parameter",
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
        [
            f"`{name}`", _state(name), _stored(name, figures), *_timed(methods.get(name)), _refresh(name, figures),
            _distance(errors.get(name)),
        ]
        for name in own_names()
    ]  # fmt: skip
    rows += [
        [label, state, _held(methods.get(name), figures), *_timed(methods.get(name)), NONE, NONE]
        for name, label, state in (
            ("torch AdamW fused", "`torch.optim.AdamW`, fused", _state("AdamW")),
            *((name, name, NONE) for name in methods if name.split()[0] in ("galore-torch", "apollo-torch", "fira")),
        )
    ]
    return f"{markdown(HEADER, rows)}\n\n{_caption(step, figures)}"


def _state(name: str) -> str:
    # What fixes the rank of a class in the comparison of steps fixes it here too.
    free = "rank" in accepted_arguments(name) and "rank" not in ARGUMENTS.get(name, {})
    args = {"rank": PLANNED_RANK} if free else {}
    job = Job(model=PLANNED, optimizer=name, optimizer_args=args)
    return f"{estimate(job).by_category['optimizer'] / 1e9:.2f}"


def _stored(name: str, figures: Mapping[str, Any]) -> str:
    """Bytes of state a parameter of the matrices that are timed, as they are planned now."""
    shapes, dtype = state_bytes.layer_shapes(TIMED), DTYPES[figures["dtype"]]
    return state_bytes.cell(state_bytes.planned(name, ARGUMENTS.get(name, {}), shapes, figures["rank"], dtype))


def _held(row: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> str:
    """The same of another package, as they were measured."""
    if row is None:
        return NONE
    return f"{row['state_bytes'] / figures['weight_bytes'] * DTYPES[figures['dtype']].itemsize:.2f}"


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
            f"State on LLaMA-7B: weights in bf16, rank {PLANNED_RANK} where a rank can be chosen.",
            f"State a parameter: of the matrices that are timed, moments in {' / '.join(state_bytes.STORED)}.",
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


# Where each table stands, its marker, and what makes it.
TABLES: tuple[tuple[Path, str, Callable[[], str]], ...] = (
    (README, front_table.BEGIN, front_table.current),
    (README, front_table.BEGIN_CHOICES, front_table.choices),
    (converge_table.PAGE, converge_table.CHOOSING, converge_table.choosing),
    (claims.PAGE, claims.BEGIN, claims.current),
    (DOCS / "memory.md", front_table.BEGIN_SETTINGS, front_table.settings),
    (DOCS / "memory.md", memory_7b.BEGIN, memory_7b.current),
    (low_bit_weights.PAGE, low_bit_weights.BEGIN, low_bit_weights.current),
    (DOCS / "methods" / "index.md", BEGIN, current),
    (DOCS / "methods" / "weights.md", parameterizations_table.BEGIN, parameterizations_table.current),
    (launches.PAGE, launches.BEGIN, launches.current),
    (aot_table.PAGE, aot_table.BEGIN, aot_table.current),
    (gpu_table.PAGE, gpu_table.BEGIN, gpu_table.current),
    (chaos_table.PAGE, chaos_table.BEGIN, chaos_table.current),
    (digests.PAGE, digests.BEGIN, digests.current),
    (distributed_table.PAGE, distributed_table.BEGIN, distributed_table.current),
    (elastic.PAGE, elastic.BEGIN, elastic.current),
    (scaling.PAGE, scaling.BEGIN, scaling.current),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw every table anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a file is out of date")
    options = parser.parse_args(argv)
    pages: dict[Path, str] = {}
    try:
        for page, marker, make in TABLES:
            text = pages.get(page) or page.read_text(encoding="utf-8")
            pages[page] = replaced(text, make(), marker)
    except ValueError as error:
        raise SystemExit(f"benchmarks.table: error: {error}") from error
    if not options.check:
        converge_table.draw_plots()
    elif stale := converge_table.stale_plots():
        raise SystemExit(f"benchmarks.table: error: {stale[0]} is out of date; run python -m benchmarks.table")
    for path, text in pages.items():
        if not options.check:
            path.write_text(text, encoding="utf-8")
        elif text != path.read_text(encoding="utf-8"):
            raise SystemExit(f"benchmarks.table: error: {path.name} is out of date; run python -m benchmarks.table")


if __name__ == "__main__":
    main()
