"""``lowrank-train compare RUN RUN …``: one table, and one page with a picture."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_optim.cli.main import PROG
from lowrank_optim.pretrain.command_line import Parser, parse_known, read_yaml
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.metrics import FILE, read_metrics
from lowrank_optim.pretrain.page import Series, chart, html_table, page
from lowrank_optim.pretrain.report import table

COLUMNS = (
    *("run", "model", "method", "lr", "updates", "tokens", "loss", "validation loss", "perplexity", "tokens/s"),
    "peak GiB",
)
# Options that a row is made of.
SHOWN = ("model", "optimizer", "optimizer_args", "batch_size", "accumulate", "seq_len")


def compare(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    parser = Parser(prog=f"{PROG} compare", description="Runs side by side.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--html", default="comparison.html", metavar="FILE", help="page to write [comparison.html]")
    parser.add_argument("--json", action="store_true", help="print one JSON object and write no page")
    given = parse_known(parser, argv, ("runs", "html", "json"))
    found = [read_run(Path(path)) for path in given.runs]
    rows = [_row(run) for run in found]
    if given.json:
        print(json.dumps([dict(zip(COLUMNS, row)) for row in rows]))
        return 0
    shown = [[_cell(value) for value in row] for row in rows]
    print(table([COLUMNS, *shown]))
    pictures = [
        chart("Validation loss", [Series(run["name"], _points(run, "eval_loss")) for run in found], "update"),
        chart("Training loss", [Series(run["name"], _points(run, "loss")) for run in found], "update"),
    ]
    body = f"<h1>Comparison</h1>{''.join(pictures)}{html_table([COLUMNS, *shown])}"
    try:
        Path(given.html).write_text(page("Comparison", body), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Invalid --html: cannot write {given.html} ({error.strerror})") from error
    print(f"\npage {given.html}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """The name, the options and the metrics of a run.

    Raises:
        UserError: no run there.
    """
    if not (folder / FILE).is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"Invalid RUN: {folder} is no run folder, expected one with config.yaml and {FILE}")
    rows = read_metrics(folder / FILE)
    if all(row.get("loss") is None for row in rows):
        raise UserError(f"Invalid RUN: {folder} has made no update with a finite loss")
    options = read_yaml(str(folder / "config.yaml"))
    if lacking := [name for name in SHOWN if name not in options]:
        raise UserError(f"Invalid RUN: {folder / 'config.yaml'} has no {lacking[0]}, expected the options of a run")
    return {"name": html.escape(folder.name), "options": options, "rows": rows}


def _points(run: dict[str, Any], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in run["rows"] if row.get(key) is not None]


def _row(run: dict[str, Any]) -> list[Any]:
    options = run["options"]
    method = " ".join([options["optimizer"], *options["optimizer_args"]])
    if options.get("parameterization"):
        method += f", {options['parameterization']}"
    losses, evaluated = _points(run, "loss"), _points(run, "eval_loss")
    last = losses[-max(1, len(losses) // 20) :]
    rates = sorted(rate for _, rate in _points(run, "tokens_per_second"))
    memory = [size for _, size in _points(run, "memory_bytes")]
    slots = options["batch_size"] * options["accumulate"] * options["seq_len"]
    validation = evaluated[-1][1] if evaluated else None
    return [
        run["name"], options["model"], method, options.get("lr"), int(losses[-1][0]), int(losses[-1][0] * slots),
        sum(loss for _, loss in last) / len(last), validation, None if validation is None else math.exp(validation),
        rates[len(rates) // 2] if rates else None, max(memory) / 2**30 if memory else None,
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
