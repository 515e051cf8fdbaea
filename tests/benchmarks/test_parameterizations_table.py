"""The table of parameterized layers says what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.parameterizations_table import layer_table

MACHINE: dict[str, Any] = {"machine": {"threads": 1, "processor": "P"}, "versions": {"torch": "2.x"}, "command": "c"}


def test_a_row_a_layer() -> None:
    shape = {"name": "small", "m": 3, "n": 2, "rank": 1, "tokens": 7, "dtype": "float32"}
    layers = {"dense": {"times_dense": 1.0, "peak_bytes": 2**20}, "ours": {"times_dense": 0.5, "peak_bytes": 3 * 2**19}}
    text = layer_table({**MACHINE, "shapes": [{**shape, "layers": layers}]})
    assert "| forward + backward | small, 3 × 2, rank 1 |" in text
    assert "| ours | 0.50 / 1.5 |" in text
    assert "7 tokens" in text
