"""FOAM (arXiv 2512.07112), the folding written as a product with a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def folding(columns: int, size: int) -> Tensor:
    """(columns, blocks), 1 where a column belongs to a block."""
    blocks = torch.arange(columns) // size
    return torch.nn.functional.one_hot(blocks).double()


def foam(
    weight: Tensor, grads: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    level: int, scale: float, residual: float, second_moment: str,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step."""
    w, trajectory = weight.clone(), []
    belongs = folding(w.shape[1], 2**level)
    average = belongs / belongs.sum(0)
    beta1, beta2 = betas
    m = v = torch.zeros(w.shape[0], belongs.shape[1], dtype=w.dtype)
    for t, g in enumerate(grads, start=1):
        a = g @ average
        r = residual * (g - a @ belongs.T)
        m = beta1 * m + (1 - beta1) * a
        v = beta2 * v + (1 - beta2) * (g.square() @ average if second_moment == "block" else a.square())
        n = (m @ belongs.T + r) / ((v @ belongs.T + r.square()).sqrt() + eps)
        w = w - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * scale * n
        w = w - lr * weight_decay * w
        trajectory.append(w)
    return trajectory
