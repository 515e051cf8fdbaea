"""Alice (arXiv 2502.07752) with all directions leading, the covariance and the residual formed."""

from __future__ import annotations

import torch
from torch import Tensor


def positive_qr(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()


def alice(
    weight: Tensor, grads: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    rank: int, gap: int, beta3: float, scale: float, compensation: float, gamma: float | None,
) -> list[Tensor]:  # fmt: skip
    """The weight (m, n), m <= n, after every step, as in the paper: the rows are compressed."""
    w, trajectory = weight.clone(), []
    size = w.shape[0]
    beta1, beta2 = betas
    u = torch.zeros(size, rank, dtype=w.dtype)
    c = torch.zeros(rank, rank, dtype=w.dtype)
    m = v = p = torch.zeros(())
    phi = 0.0
    for t, g in enumerate(grads, start=1):
        if (t - 1) % gap == 0:
            q = beta3 * u @ c @ u.T + (1 - beta3) * g @ g.T
            u = torch.linalg.svd(g).U[:, :rank] if t == 1 else u
            u = positive_qr(q @ u)
            e = torch.linalg.eigh(u.T @ q @ u).eigenvectors.flip(1)
            u = u @ (e * e.diagonal().sign())
        sigma = u.T @ g
        c = beta3 * c + (1 - beta3) * sigma @ sigma.T
        m, v = beta1 * m + (1 - beta1) * sigma, beta2 * v + (1 - beta2) * sigma**2
        p = beta1 * p + (1 - beta1) * (g.square().sum(0) - sigma.square().sum(0))
        s = (size - rank) ** 0.5 * (g - u @ sigma) / p.sqrt()
        if gamma is not None and phi > 0:
            s = s / (max(float(s.norm()) / (phi + 1e-8), gamma) / gamma)
        phi = float(s.norm())
        w = (1 - lr * weight_decay) * w - lr * scale * (u @ (m / (v.sqrt() + eps)) + compensation * s)
        trajectory.append(w)
    return trajectory
