"""LoRA-Pre (arXiv 2602.24283), Adam variant, from given factors A; both moments formed."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    shift = damping * gram.trace() + torch.finfo(gram.dtype).tiny
    return torch.linalg.inv(gram + shift * torch.eye(len(gram), dtype=gram.dtype))


def lora_pre(
    weight: Tensor, grads: list[Tensor], starts: tuple[Tensor, Tensor], *, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float, scale: float, damping: float, debias: str,
) -> list[Tensor]:  # fmt: skip
    """The weight (m, n) after every step; ``starts`` are the factors A (rank, n) of the two moments."""
    w, trajectory = weight.clone(), []
    beta1, beta2 = betas
    gamma1, gamma2 = 1 - beta1**0.5, 1 - beta2**0.25
    rank = starts[0].shape[0]
    mb = vb = torch.zeros(w.shape[0], rank, dtype=w.dtype)
    ma, va = starts
    for t, g in enumerate(grads, start=1):
        m = (beta1 * mb @ ma + (1 - beta1) * g) / (1 - beta1**t)
        if debias == "published":
            v = (beta2 * (vb @ va).square() + (1 - beta2) * g.square()) / (1 - beta2**t)
        elif t == 1:
            v = g.square()
        else:
            v = beta2 * (vb @ va / (1 - beta2 ** ((t - 1) / 2))).square() + (1 - beta2) * g.square()
        w = (1 - lr * weight_decay) * w - lr * scale * m / (v.sqrt() + eps)
        mb, ma = (
            (1 - gamma1) * mb + gamma1 * g @ ma.T @ damped_inverse(ma @ ma.T, damping),
            (1 - gamma1) * ma + gamma1 * damped_inverse(mb.T @ mb, damping) @ mb.T @ g,
        )
        vb, va = (
            (1 - gamma2) * vb + gamma2 * g.abs() @ va.T @ damped_inverse(va @ va.T, damping),
            (1 - gamma2) * va + gamma2 * damped_inverse(vb.T @ vb, damping) @ vb.T @ g.abs(),
        )
        trajectory.append(w)
    return trajectory
