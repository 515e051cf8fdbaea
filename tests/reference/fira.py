"""Fira (arXiv 2410.01623): the authors' code ("reference") and algorithm 1 ("paper"), explicit residual."""

from __future__ import annotations

import torch
from torch import Tensor


def fira(
    weight: Tensor, grads: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    rank: int, gap: int, alpha: float, gamma: float, residual: str,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step."""
    w = weight.clone()
    left = w.shape[0] < w.shape[1]
    beta1, beta2 = betas
    previous = torch.tensor(0.0, dtype=w.dtype)
    m = v = torch.zeros(())
    trajectory = []
    for t, g in enumerate(grads, start=1):
        if (t - 1) % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :rank] if left else vh[:rank].T
        r = p.T @ g if left else g @ p
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        correction = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        n = m / (v.sqrt() + eps)
        axis = 0 if left else 1
        phi = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
        lifted_r, lifted_n = (p @ r, p @ n) if left else (r @ p.T, n @ p.T)
        paper = residual == "paper"
        s = phi * (g - lifted_r) if paper else phi * (g - alpha * lifted_r)
        seen = s.norm() * (correction if paper else 1)
        limit = torch.tensor(1.0, dtype=w.dtype)
        # Ours: a previous norm that is nearly nothing limits nothing.
        if previous > 1e-3 * n.norm():
            limit = torch.maximum(seen / (previous + 1e-8), torch.tensor(gamma, dtype=w.dtype)) / gamma
        previous, s = seen / limit, s / limit
        w = w - lr * correction * (alpha * (lifted_n + s) if paper else alpha * lifted_n + s)
        w = w - lr * weight_decay * w
        trajectory.append(w)
    return trajectory
