"""Random matrices that make a refresh linear in the gradient, so that micro-batches can be summed."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.optim.protocols import Group, State

# Sets these random bits apart from those of moments, weights and random bases.
SALT = 6


def sketch_matrix(rows: int, columns: int, like: Tensor, state: State, group: Group) -> Tensor:
    """Independent real N(0, 1) in the dtype of ``like``; the same for all micro-batches of an update."""
    draw = pick(gaussian, group["backend"], like.device)
    key = mix_key(state["seed"], state["step"], SALT)
    return draw(rows, columns, key=key, dtype=like.dtype.to_real(), device=like.device).to(like.dtype)
