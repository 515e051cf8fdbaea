"""The tables of docs/methods/weights.md from ``results``; ``python -m benchmarks.table`` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import read_result
from benchmarks.parameterizations_c4 import BASELINES, contestants

BEGIN = "<!-- table:parameterizations -->"


def layer_table(result: Mapping[str, Any]) -> str:
    """Time and memory of one layer, from what ``benchmarks.parameterizations`` wrote."""
    shapes = result["shapes"]
    header = ["forward + backward", *(f"{s['name']}, {s['m']} × {s['n']}, rank {s['rank']}" for s in shapes)]
    rows = [[name, *(_costs(shape["layers"][name]) for shape in shapes)] for name in shapes[0]["layers"]]
    machine = result["machine"]
    device = machine.get("accelerator") or f"{machine['threads']} thread of {machine['processor']}"
    caption = (
        f"Time over a dense layer's / peak MiB above the layer: {shapes[0]['tokens']} tokens, {shapes[0]['dtype']}, "
        f"{device}, torch {result['versions']['torch']}.\n"
        "sltrain published: W and a dense G rebuilt, as in the paper's code; sst: a quarter of the rank. "
        f"Made by `{result['command']}`."
    )
    return f"{_markdown(header, rows)}\n\n{caption}"


def loss_table(result: Mapping[str, Any]) -> str:
    """Losses on C4 text, from what ``benchmarks.parameterizations_c4`` wrote."""
    settings = result["settings"]
    header = ["C4 bytes", "trained parameters", "best learning rate", "validation loss", "below low rank"]
    runs = result["runs"]
    baseline = min(runs[name]["validation_loss"] for name in BASELINES if name in runs)
    rows = [
        [name, f"{row['parameters']:,}", f"{row['lr']:g}", _losses(row), f"{baseline - row['validation_loss']:+.3f}"]
        for name, row in runs.items()
    ]
    batch = f"{settings['batch_size']} × {settings['seq_len']}"
    caption = (
        f"{settings['model'].replace('_', '-')} with bytes as tokens, rank {settings['rank']}, {settings['steps']} "
        f"updates of {batch}; mean (range) of {len(settings['seeds'])} seeds, nats a byte.\n"
        f"Below: the better of the two low-rank starts. Made by `{result['command']}`."
    )
    missing = [name for name in contestants(settings["rank"]) if name not in runs]
    if missing:
        caption += f"\nNot measured yet: {', '.join(missing)}."
    return f"{_markdown(header, rows)}\n\n{caption}"


def current() -> str:
    """Both tables.

    Raises:
        ValueError: one of them has not been measured.
    """
    found = {name: read_result(name) for name in ("parameterizations_cpu", "parameterizations_c4")}
    layers, losses = found.values()
    if layers is None or losses is None:
        raise ValueError(f"Invalid results: expected {', '.join(f'{name}.json' for name in found)}")
    return f"{layer_table(layers)}\n\n{loss_table(losses)}"


def _costs(row: Mapping[str, Any]) -> str:
    return f"{row['times_dense']:.2f} / {row['peak_bytes'] / 2**20:.1f}"


def _losses(row: Mapping[str, Any]) -> str:
    values = row["validation_losses"]
    return f"{row['validation_loss']:.3f} ({max(values) - min(values):.3f})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|---{'|---:' * (len(header) - 1)}|", *lines[1:]])
