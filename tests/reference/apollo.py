"""APOLLO (arXiv 2412.05270), algorithm 1, with given sketches."""

from __future__ import annotations

import torch
from torch import Tensor


def apollo(
    weight: Tensor, grads: list[Tensor], sketches: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, gap: int, scale: float, scale_type: str, scale_front: bool, gamma: float | None,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step; ``sketches`` are (smaller side, rank), one a refresh."""
    w = weight.clone()
    wide = w.shape[0] < w.shape[1]
    beta1, beta2 = betas
    previous = 0.0
    m = v = torch.zeros(())
    trajectory = []
    for t, g in enumerate(grads, start=1):
        p = sketches[(t - 1) // gap]
        r = p.T @ g if wide else g @ p
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        n = m / (v.sqrt() + eps)
        if scale_type == "tensor":
            s = g * n.norm() / (r.norm() + 1e-8)
        elif wide:
            s = torch.stack([g[:, j] * n[:, j].norm() / (r[:, j].norm() + 1e-8) for j in range(g.shape[1])], dim=1)
        else:
            s = torch.stack([g[i] * n[i].norm() / (r[i].norm() + 1e-8) for i in range(g.shape[0])])
        if scale_front:
            s = s * scale**0.5
        if gamma is not None:
            size = float(s.norm())
            if previous > 1e-3 * float(n.norm()):
                s = s / (max(size / (previous + 1e-8), gamma) / gamma)
            previous = float(s.norm())
        if not scale_front:
            s = s * scale**0.5
        w = w - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * s
        w = w - lr * weight_decay * w
        trajectory.append(w)
    return trajectory
