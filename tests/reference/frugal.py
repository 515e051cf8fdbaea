"""FRUGAL (arXiv 2411.07837), algorithm 1: AdamW on the projection, signSGD on the rest, no memory of it."""

from __future__ import annotations

import torch
from torch import Tensor


def frugal(
    weight: Tensor, grads: list[Tensor], bases: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, gap: int, inactive_lr_scale: float,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step; ``bases`` are (smaller side, rank), one a change."""
    w = weight.clone()
    wide = w.shape[0] < w.shape[1]
    beta1, beta2 = betas
    m = v = torch.zeros(())
    trajectory = []
    for step, g in enumerate(grads):
        p = bases[step // gap]
        t = step % gap + 1
        if t == 1:
            m = v = torch.zeros(())
        active = p.T @ g if wide else g @ p
        m, v = beta1 * m + (1 - beta1) * active, beta2 * v + (1 - beta2) * active**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        rest = g - (p @ active if wide else active @ p.T)
        w = w * (1 - lr * weight_decay)
        w = w - lr * (p @ n if wide else n @ p.T) - lr * inactive_lr_scale * rest.sign()
        trajectory.append(w)
    return trajectory
