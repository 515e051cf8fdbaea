"""Muon as its authors publish it (https://kellerjordan.github.io/posts/muon), in the precision of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    x = g / (g.norm() + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def muon(
    weight: Tensor, grads: list[Tensor], *, lr: float, momentum: float, nesterov: bool, scale: float, steps: int,
    weight_decay: float,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step."""
    w, trajectory = weight.clone(), []
    mean = torch.zeros_like(w)
    for g in grads:
        mean = momentum * mean + (1 - momentum) * g
        ahead = momentum * mean + (1 - momentum) * g if nesterov else mean
        w = (1 - lr * weight_decay) * w - lr * scale * newton_schulz(ahead, steps)
        trajectory.append(w)
    return trajectory
