"""SinkGD (arXiv 2502.06742), SCALE (2506.16659) and RACS (2502.07752), matrices formed as the papers write them."""

from __future__ import annotations

import torch
from torch import Tensor


def sinkgd(
    weight: Tensor, grads: list[Tensor], *, lr: float, scale: float, iterations: int, weight_decay: float
) -> list[Tensor]:
    """The weight after every step."""
    w, trajectory = weight.clone(), []
    m, n = w.shape
    for g in grads:
        x = g.clone()
        for _ in range(iterations):
            for i in range(m):
                x[i] *= n**0.5 / x[i].norm()
            for j in range(n):
                x[:, j] *= m**0.5 / x[:, j].norm()
        w = (1 - lr * weight_decay) * w - lr * scale * x
        trajectory.append(w)
    return trajectory


def scale(
    weight: Tensor, grads: list[Tensor], role: str, *, lr: float, beta: float, weight_decay: float
) -> list[Tensor]:
    """The weight (out, in) of a "matrix", "embedding" or "head" after every step."""
    w, trajectory = weight.clone(), []
    mean = torch.zeros_like(w)
    for g in grads:
        mean = beta * mean + (1 - beta) * g
        x = mean if role == "head" else g
        rms = x.square().mean(0 if role == "embedding" else 1, keepdim=True).sqrt()
        w = (1 - lr * weight_decay) * w
        w = w - lr * x / torch.maximum(rms, torch.tensor(1e-8, dtype=w.dtype))
        trajectory.append(w)
    return trajectory


def racs(
    weight: Tensor, grads: list[Tensor], *, lr: float, scale: float, beta: float, gamma: float | None, iterations: int,
    weight_decay: float,
) -> list[Tensor]:  # fmt: skip
    """The weight after every step."""
    w, trajectory = weight.clone(), []
    mean_s, mean_q = torch.zeros_like(w[0]), torch.zeros_like(w[:, 0])
    phi = 0.0
    for g in grads:
        p = g.square()
        q = torch.ones_like(mean_q)
        for _ in range(iterations):
            s = p.T @ q / (q @ q)
            q = p @ s / (s @ s)
        mean_s = beta * mean_s + (1 - beta) * s
        mean_q = beta * mean_q + (1 - beta) * q
        x = g / torch.outer(mean_q, mean_s).sqrt()
        if gamma is not None and phi > 0:
            x = x / (max(float(x.norm()) / (phi + 1e-8), gamma) / gamma)
        phi = float(x.norm())
        w = (1 - lr * weight_decay) * w - lr * scale * x
        trajectory.append(w)
    return trajectory
