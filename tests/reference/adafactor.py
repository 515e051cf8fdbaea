"""GaLore with Adafactor in float64 numpy, written from the formulas: arXiv 2403.03507, arXiv 1804.04235 algorithm 5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x * x)))


def galore_adafactor(
    weight: Array, grads: Sequence[Array], *, rank: int, gap: int, scale: float, lr: float | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3), clip: float = 1.0, decay_rate: float = -0.8, beta1: float | None = None,
    weight_decay: float = 0.0, scale_parameter: bool = True, warmup_init: bool = False,
) -> list[Array]:  # fmt: skip
    """The weight after every update; the basis is on the smaller side, from an exact SVD."""
    weight = weight.copy()
    rows, columns = weight.shape
    row: Array | float = 0.0
    col: Array | float = 0.0
    mean: Array | float = 0.0
    trajectory = []
    for t, grad in enumerate(grads, start=1):
        if (t - 1) % gap == 0:
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            left, right = (np.eye(rows), vt[:rank].T) if rows >= columns else (u[:, :rank], np.eye(columns))
        low = left.T @ grad @ right
        step = lr if lr is not None else min(1e-6 * t if warmup_init else 1e-2, 1 / np.sqrt(t))
        step *= max(eps[1], rms(weight)) if scale_parameter else 1.0
        beta2 = 1 - t**decay_rate
        square = low**2 + eps[0]
        row = beta2 * row + (1 - beta2) * square.mean(axis=1)
        col = beta2 * col + (1 - beta2) * square.mean(axis=0)
        update = low / np.sqrt(np.outer(row, col) / np.mean(row))
        update = step * update / max(1.0, rms(update) / clip)
        if beta1 is not None:
            mean = beta1 * mean + (1 - beta1) * update
            update = mean
        weight = (1 - weight_decay * step) * weight - scale * left @ update @ right.T
        trajectory.append(weight)
    return trajectory
