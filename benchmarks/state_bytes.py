"""Bytes of optimizer state a parameter of a model's projected matrices, planned on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import built
from benchmarks.common import held_bytes
from lowrank_optim.memory.estimate import init_state_
from lowrank_optim.pretrain.llama import PRESETS

# Moments, and what else ``state_dtype`` says, are stored so; bases have the dtype of the weights.
STORED = ("float32", "bfloat16", "int8")


def layer_shapes(model: str) -> list[torch.Size]:
    """The weights of a layer that are projected: four of attention, two up, one down."""
    shape = PRESETS[model]
    sides = [(shape.hidden,) * 2] * 4 + [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]
    return [torch.Size(pair) for pair in sides]


def planned(
    name: str, arguments: Mapping[str, Any], shapes: Sequence[torch.Size], rank: int, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes a parameter for each of :data:`STORED`, by the optimizer's own initialisation.

    Args:
        name: of an optimizer of this package.
        arguments: beside the rank.
        shapes: of the weights.
        rank: where the optimizer lets one choose.
        dtype: of the weights.
    """
    found = {}
    for state_dtype in STORED:
        params = [nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)) for shape in shapes]
        optimizer = built(name, {**arguments, "state_dtype": state_dtype})(params, rank)
        init_state_(optimizer)
        found[state_dtype] = held_bytes(optimizer.state) / sum(p.numel() for p in params)
    return found


def cell(found: dict[str, float] | None) -> str:
    """For a table: one number where the dtype makes no difference."""
    if not found:
        return "–"
    words = [f"{value:.2f}" for value in found.values()]
    return words[0] if len(set(words)) == 1 else " / ".join(words)
