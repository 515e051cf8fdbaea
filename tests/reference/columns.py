"""DCT-AdamW and Trion in float64 numpy, from the formulas of arXiv 2505.17967, in the coordinates of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cosine_basis(size: int, kind: str) -> Array:
    """Columns are the basis vectors."""
    vectors = np.array([[np.cos(np.pi * f * (2 * j + 1) / (2 * size)) for f in range(size)] for j in range(size)])
    vectors *= np.sqrt(2 / size)
    vectors[:, 0] /= np.sqrt(2)
    return vectors if kind == "dct2" else vectors.T


def best_columns(scored: Array, rank: int, ell_norm: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-np.linalg.norm(scored, ell_norm, axis=0), kind="stable")[:rank])


def dct_adamw(
    weight: Array, grads: Sequence[Array], *,
    basis: Array, rank: int, gap: int, ell_norm: int, rotate: bool, feedback: bool,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[list[Array], Array]:  # fmt: skip
    """The weight after every update, and the last error; both sides of the weight may be the smaller."""
    if weight.shape[0] < weight.shape[1]:
        trajectory, error = dct_adamw(
            weight.T, [g.T for g in grads], basis=basis, rank=rank, gap=gap, ell_norm=ell_norm, rotate=rotate,
            feedback=feedback, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        return [w.T for w in trajectory], error.T
    beta1, beta2 = betas
    weight, error, trajectory = weight.copy(), np.zeros_like(weight), []
    m = v = np.zeros((weight.shape[0], rank))
    vectors = basis[:, :rank]
    for t, grad in enumerate(grads, start=1):
        weight = (1 - lr * weight_decay) * weight
        total = grad + error
        if (t - 1) % gap == 0:
            old, vectors = vectors, basis[:, best_columns(total @ basis, rank, ell_norm)]
            if rotate and t > 1:
                # A 0/1 matrix; what the product has beside it (1e-17) would enlarge in empty columns of v.
                turn = np.rint(old.T @ vectors)
                m, v = m @ turn, np.abs(v @ turn)
        low = total @ vectors
        if feedback:
            error = total - low @ vectors.T
        m = beta1 * m + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low**2
        weight = weight - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) @ vectors.T
        trajectory.append(weight)
    return trajectory, error


def newton_schulz(x: Array, steps: int) -> Array:
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def trion(
    weight: Array, grads: Sequence[Array], *,
    basis: Array, rank: int, gap: int, ell_norm: int, momentum: float, ns_steps: int,
    scale: float, lr: float, weight_decay: float,
) -> list[Array]:  # fmt: skip
    """The weight after every update; the smaller side is compressed."""
    left = weight.shape[0] < weight.shape[1]
    weight, buffer, trajectory = weight.copy(), np.zeros_like(weight), []
    indices = np.arange(rank)
    for t, grad in enumerate(grads, start=1):
        buffer = buffer + grad
        tall = buffer.T if left else buffer
        if (t - 1) % gap == 0:
            indices = best_columns(tall @ basis, rank, ell_norm)
        vectors = basis[:, indices]
        low = tall @ vectors
        captured = low @ vectors.T
        buffer = buffer - (1 - momentum) * (captured.T if left else captured)
        update = newton_schulz(low, ns_steps) @ vectors.T
        weight = (1 - lr * weight_decay) * weight - lr * scale * (update.T if left else update)
        trajectory.append(weight)
    return trajectory
