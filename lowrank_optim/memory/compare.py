"""Memory of all methods and sizes side by side: table, CSV, a figure of stacked bars, and one HTML page."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowrank_optim.memory.estimate import CATEGORIES, estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.published import RANKS
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.optim.validation import nearest
from lowrank_optim.pretrain.config import OPTIMIZER_OF
from lowrank_optim.pretrain.optimizers import (
    accepted_arguments,
    low_rank_names,
    optimizer_names,
    parse_optimizer_args,
)
from lowrank_optim.pretrain.page import html_table, page
from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = dict(zip(CATEGORIES, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#bbbbbb")))


class Row(NamedTuple):
    """Bytes of one method on one model, its states in one precision."""

    model: str
    method: str
    state_dtype: str
    total_bytes: int
    by_category: Mapping[str, int]


def all_methods() -> list[tuple[str, str | None]]:
    """Optimizers with the parameterization that they train: the full-rank ones, the low-rank ones, the layers."""
    known = optimizer_names()
    plain = [*(name for name in ("AdamW", "AdamW8bit") if name in known), *low_rank_names()]
    return [*((name, None) for name in plain), *((OPTIMIZER_OF.get(p, "AdamW"), p) for p in PARAMETERIZATIONS)]


def compare(
    models: Sequence[str],
    methods: Sequence[tuple[str, str | None]],
    args: Mapping[str, Any],
    job: Job,
    *,
    simulated: bool = False,
) -> list[Row]:
    """One row for every model, method and precision of the states: fp32, bf16, or what the method prescribes.

    Args:
        models: presets or paths.
        methods: optimizers, each with a parameterization or None.
        args: an argument goes to every optimizer that has it; a rank that is not given is that of GaLore's Table 2.
        job: everything else.
        simulated: simulated peaks instead of the closed form.

    Raises:
        ValueError: an argument that no optimizer has.
    """
    accepted = {name: accepted_arguments(name) for name, _ in methods}
    anywhere = set().union(*accepted.values())
    for key in args:
        if key not in anywhere:
            raise ValueError(
                f"Invalid argument: {key!r}, expected an argument of {', '.join(accepted)}" + nearest(key, anywhere)
            )
    rows = []
    for model in models:
        for name, layers in methods:
            # The rank of APOLLOMini is one.
            ranked = model in RANKS and layers is None and name != "APOLLOMini"
            given = {"rank": RANKS[model]} if ranked else {}
            given = {key: value for key, value in {**given, **args}.items() if key in accepted[name]}
            this = replace(job, model=model, optimizer=name, optimizer_args=given, parameterization=layers)
            for precise in in_both_precisions(this, accepted[name]):
                expected = estimate(precise)
                sizes = simulate(precise).by_category if simulated else expected.by_category
                rows.append(Row(model, this.method, expected.state_dtype, sum(sizes.values()), sizes))
    return rows


def in_both_precisions(job: Job, accepted: Sequence[str]) -> list[Job]:
    """The job with states in fp32 and in bf16, where its optimizer has the choice and the arguments leave it open.

    torch's AdamW keeps states in the dtype of the weights; beside bf16 weights AdamW in fp32 is ours without a rank.
    """
    given = parse_optimizer_args(job.optimizer_args)
    if job.optimizer == "AdamW" and job.dtype == "bf16" and not given:
        own = {"rank": None, "state_dtype": "float32"}
        return [job, replace(job, optimizer="GaLoreAdamW", optimizer_args=own)]
    if "state_dtype" not in accepted or "state_dtype" in given or job.optimizer.endswith("8bit"):
        return [job]
    return [replace(job, optimizer_args={**given, "state_dtype": dtype}) for dtype in ("float32", "bfloat16")]


def table(rows: Sequence[Row]) -> str:
    """Text, in 10^9 bytes."""
    shown = _shown(rows)
    width = max(len(row.method) for row in rows)
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        heads = ["state dtype", *shown, "total", "total GiB"]
        lines += ["", f"{model + ', GB':{width}}" + "".join(f"{name:>13}" for name in heads)]
        for row in rows:
            if row.model == model:
                cells = [row.by_category[name] / 1e9 for name in shown]
                cells += [row.total_bytes / 1e9, row.total_bytes / 2**30]
                lines.append(f"{row.method:{width}}{row.state_dtype:>13}" + "".join(f"{cell:13.3f}" for cell in cells))
    return "\n".join(lines[1:])


def write_csv(path: str, rows: Sequence[Row], _title: str) -> None:
    """One line a row, sizes in bytes."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "method", "state_dtype", *CATEGORIES, "total"])
        for row in rows:
            sizes = [row.by_category[name] for name in CATEGORIES]
            writer.writerow([row.model, row.method, row.state_dtype, *sizes, row.total_bytes])


def figure(rows: Sequence[Row]) -> Figure:
    """Stacked bars, one panel a model.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("Plots need matplotlib: pip install 'lowrank-optim[plots]'") from error
    models = list(dict.fromkeys(row.model for row in rows))
    most = max(sum(row.model == model for row in rows) for model in models)
    drawn = Figure(figsize=(9, len(models) * (0.8 + 0.22 * most)), layout="constrained")
    panels = drawn.subplots(len(models), squeeze=False)[:, 0]
    for model, panel in zip(models, panels):
        here = [row for row in rows if row.model == model]
        labels, left = [f"{row.method}, {row.state_dtype}" for row in here], [0.0] * len(here)
        for name in _shown(rows):
            sizes = [row.by_category[name] / 1e9 for row in here]
            panel.barh(labels, sizes, left=left, label=name, color=COLORS[name], height=0.7)
            left = [start + size for start, size in zip(left, sizes)]
        panel.invert_yaxis()
        panel.set_title(model, loc="left", fontsize=10)
        panel.set_xlabel("GB (10^9 bytes)", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, loc="lower right")
    return drawn


def write_png(path: str, rows: Sequence[Row], title: str) -> None:
    """Save the figure."""
    drawn = figure(rows)
    drawn.suptitle(title, fontsize=10)
    drawn.savefig(path, format="png", dpi=150)


def write_html(path: str, rows: Sequence[Row], title: str) -> None:
    """One page with the figure as SVG and the table, which needs no other file."""
    image = io.StringIO()
    figure(rows).savefig(image, format="svg")
    svg = image.getvalue()
    shown = _shown(rows)
    cells = [["model", "method", "state dtype", *shown, "total"]]
    for row in rows:
        sizes = [*(row.by_category[name] for name in shown), row.total_bytes]
        cells.append([row.model, row.method, row.state_dtype, *(f"{size / 1e9:.3f}" for size in sizes)])
    body = f"<h1>{html.escape(title)}</h1>\n{svg[svg.index('<svg') :]}\n<p>GB, 10^9 bytes.</p>\n{html_table(cells)}"
    Path(path).write_text(page(html.escape(title), body), encoding="utf-8")


def _shown(rows: Sequence[Row]) -> list[str]:
    return [name for name in CATEGORIES if any(row.by_category[name] for row in rows)]
