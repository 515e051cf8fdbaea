"""The tables of docs/methods/weights.md from ``results``; ``python -m benchmarks.table`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import markdown, needed_result

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
    return f"{markdown(header, rows)}\n\n{caption}"


def current() -> str:
    """The table.

    Raises:
        ValueError: it has not been measured.
    """
    layers = needed_result("parameterizations_cpu", "benchmarks.parameterizations")
    return layer_table(layers)


def _costs(row: Mapping[str, Any]) -> str:
    return f"{row['times_dense']:.2f} / {row['peak_bytes'] / 2**20:.1f}"
