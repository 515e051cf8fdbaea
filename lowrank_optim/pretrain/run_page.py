"""``report.html``: what a run did, on one page that needs no other file and no network."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_optim.pretrain.command_line import read_yaml
from lowrank_optim.pretrain.metrics import FILE, read_metrics
from lowrank_optim.pretrain.page import Series, chart, heat_map, html_table, page

NAME = "report.html"
ENERGY = "energy/"


def write_page(folder: Path, *, memory: str, summary: str, sample: str) -> Path:
    """Write the page of a run into its folder.

    Args:
        folder: with ``metrics.jsonl`` and ``config.yaml``.
        memory: the table of the memory.
        summary: the last lines of the run.
        sample: text of the model, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    rows = read_metrics(folder / FILE)
    options = read_yaml(str(folder / "config.yaml"))
    title = html.escape(f"{options['model']}, {options['optimizer']}: {folder.name}")
    sections = [f"<h1>{title}</h1>", f"<pre>{html.escape(summary)}</pre>", f'<div class="charts">{_charts(rows)}</div>']
    if not any(key.startswith(ENERGY) for row in rows for key in row):
        why = "the method has no orthonormal bases, or gradients are freed before it could be (--per-layer)"
        sections.append(f"<p>Captured energy is not recorded: {why}.</p>")
    sections += ["<h2>Memory</h2>", f"<pre>{html.escape(memory)}</pre>"]
    if sample:
        sections += ["<h2>Sample</h2>", f"<pre>{html.escape(sample)}</pre>"]
    shown = [("option", "value")]
    shown += [(key, " ".join(value) if isinstance(value, list) else str(value)) for key, value in options.items()]
    sections += ["<h2>Configuration</h2>", html_table(shown)]
    path = folder / NAME
    path.write_text(page(title, "\n".join(sections)), encoding="utf-8")
    return path


def _charts(rows: Sequence[dict[str, Any]]) -> str:
    def points(key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(row["step"], row[key] / scale) for row in rows if row.get(key) is not None]

    by_layer, by_kind = _energy(rows)
    return "".join(
        [
            chart("Loss", [Series("training", points("loss")), Series("validation", points("eval_loss"))], "update"),
            chart("Learning rate", [Series("learning rate", points("lr"))], "update"),
            chart("Gradient norm", [Series("norm", points("grad_norm"))], "update", logarithmic=True),
            chart(
                "Memory, GiB",
                [Series("now", points("memory_bytes", 2**30)), Series("peak", points("peak_memory_bytes", 2**30))],
                "update",
            ),
            chart("Seconds spent in refreshes, summed", [Series("refreshes", points("refresh_seconds"))], "update"),
            chart("Tokens per second", [Series("tokens", points("tokens_per_second"))], "update"),
            heat_map("Share of the gradient's energy that the bases capture, by layer", by_layer, "update"),
            chart("The same by kind of matrix", [Series(name, found) for name, found in by_kind.items()], "update"),
        ]
    )


def _energy(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, list[tuple[float, float]]], ...]:
    """The captured energy at each update, means over the matrices of a layer and over the layers of a kind."""
    found: tuple[dict[str, list[tuple[float, float]]], ...] = ({}, {})
    for row in rows:
        groups: tuple[dict[str, list[float]], ...] = ({}, {})
        for key, value in row.items():
            if key.startswith(ENERGY) and value is not None:
                name = key.removeprefix(ENERGY).removesuffix(".weight")
                number = re.search(r"\.(\d+)\.", name)
                groups[0].setdefault(number[1] if number else name, []).append(value)
                groups[1].setdefault(name.rpartition(".")[2], []).append(value)
        for group, means in zip(groups, found):
            for name, values in group.items():
                means.setdefault(html.escape(name), []).append((row["step"], sum(values) / len(values)))
    return found
