"""GoLore (arXiv 2410.11289) with AdamW, from given random bases."""

from __future__ import annotations

import torch
from torch import Tensor


def golore(
    weight: Tensor, grads: list[Tensor], drawn: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, rank: int, gap: int, random_from: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step; ``drawn`` are (smaller side, rank), one a refresh from ``random_from`` on."""
    w, bases = weight.clone(), list(drawn)
    left = w.shape[0] < w.shape[1]
    beta1, beta2 = betas
    m = v = p = torch.zeros(())
    trajectory = []
    for t, g in enumerate(grads, start=1):
        if (t - 1) % gap == 0:
            old = p
            if t - 1 >= random_from:
                p = bases.pop(0)
            else:
                u, _, vh = torch.linalg.svd(g, full_matrices=False)
                p = u[:, :rank] if left else vh[:rank].T
            if t > 1:
                m = (p.T @ old) @ m if left else m @ (old.T @ p)
        r = p.T @ g if left else g @ p
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        n = m / (v.sqrt() + eps)
        w = w - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * scale * (p @ n if left else n @ p.T)
        w = (1 - lr * weight_decay) * w
        trajectory.append(w)
    return trajectory
