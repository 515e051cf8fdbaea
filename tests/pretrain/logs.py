"""What a run has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_optim.pretrain.metrics import read_metrics

# What another machine or load would change.
OF_MACHINE = {"tokens_per_second", "refresh_seconds", "memory_bytes", "peak_memory_bytes"}


def rows(folder: Path, *, energy: bool = True) -> list[dict[str, Any]]:
    """The metrics of a run that are those of the same run elsewhere.

    Args:
        energy: keep what bases capture of gradients, which updates in the backward pass do not measure.
    """
    return [
        {k: v for k, v in row.items() if k not in OF_MACHINE and (energy or not k.startswith("energy/"))}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
