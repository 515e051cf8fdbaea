"""LDAdamW in float64 numpy, from the formulas of arXiv 2410.16103, basis on the left: P (m, r), moments (r, n)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ldadamw(
    weight: Array, grads: Sequence[Array], *, left: bool, rank: int, rho: float, proj_method: str, feedback: bool,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> list[Array]:  # fmt: skip
    """The weight after every update."""
    if not left:
        transposed = ldadamw(
            weight.T, [g.T for g in grads], left=True, rank=rank, rho=rho, proj_method=proj_method, feedback=feedback,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        return [w.T for w in transposed]
    beta1, beta2 = betas
    weight, error, trajectory = weight.copy(), np.zeros_like(weight), []
    m = v = np.zeros((rank, weight.shape[1]))
    p = np.zeros((weight.shape[0], rank))
    for t, grad in enumerate(grads, start=1):
        total = grad + error
        old = p
        mean = m / (1 - beta1 ** (t - 1)) if t > 1 else m
        second = v / (1 - beta2 ** (t - 1)) if t > 1 else v
        b = rho * old @ mean + (1 - rho) * total
        if t == 1 or proj_method == "svd":
            p = np.linalg.svd(b, full_matrices=False)[0][:, :rank]
        else:
            p = np.linalg.qr(b @ (b.T @ old))[0]
        low, q = p.T @ total, p.T @ old
        moved = q @ m
        if feedback:
            error = total - p @ low + beta1 / (1 - beta1) * (old @ m - p @ moved)
        v = (1 - beta2 ** (t - 1)) * np.abs((q * q) @ (second - mean * mean) + (q @ mean) ** 2)
        m = beta1 * moved + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low**2
        direction = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        weight = (1 - lr * weight_decay) * weight - lr * p @ direction
        trajectory.append(weight)
    return trajectory
