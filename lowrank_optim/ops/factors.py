"""Operations on the two factors of W = B A that never form W."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_factors(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B <- U sqrt(S) and A <- sqrt(S) Vᵀ of B A = U S Vᵀ, from two thin QRs and an r x r SVD.

    Directions that B A has lost (singular values of rounding size, B = 0 among them) keep a row of A: where both
    the column of B and the row of A vanish, both gradients do, and the direction would be dead for good.

    Args:
        b: B (m, r), fp32 or wider.
        a: A (r, n), fp32 or wider.

    Returns:
        The new B and A; the old ones where B A = 0.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    left, singular, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    largest = singular[0]
    if largest == 0:
        return b, a
    floor = largest * torch.finfo(b.dtype).eps
    kept = torch.where(singular > floor, singular, 0)
    return q_b @ (left * kept.sqrt()), (singular.clamp_min(floor).sqrt()[:, None] * right) @ q_a.mT


def retracted_step(b: Tensor, a: Tensor, d_b: Tensor, d_a: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor] | None:
    """The rank-r truncation of B A - lr P(G), where P projects on the tangent space of rank-r matrices at B A.

    G is known through G Aᵀ and Bᵀ G alone. With B = Q_b R_b and Aᵀ = Q_a R_a:

        X = G Q_a = (G Aᵀ) R_a⁻¹          Y = Gᵀ Q_b = (R_b⁻ᵀ Bᵀ G)ᵀ
        X - Q_b Q_bᵀ X = Q_b' R_b'        Y - Q_a Q_aᵀ Y = Q_a' R_a'

        B A - lr P(G) = [Q_b Q_b'] [R_b R_aᵀ - lr M,  -lr R_a'ᵀ] [Q_a Q_a']ᵀ
                                   [-lr R_b',          0       ]

    with M = Q_bᵀ G Q_a, the mean of Q_bᵀ X and Yᵀ Q_a where these differ (directions of an optimizer are no
    gradient of one matrix). An SVD of the 2r x 2r core gives the truncation, split evenly between the factors.

    Args:
        b: B (m, r), of full column rank, fp32 or wider.
        a: A (r, n), of full row rank.
        d_b: G Aᵀ (m, r), or the direction that stands for it.
        d_a: Bᵀ G (r, n), likewise.
        lr: the step.

    Returns:
        The new B and A; None where a factor has no full rank.
    """
    rank = b.shape[1]
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    for triangle in (r_b, r_a):
        diagonal = triangle.diagonal().abs()
        if not diagonal.min() > diagonal.max() * torch.finfo(b.dtype).eps * max(b.shape[0], a.shape[1]):
            return None
    x = torch.linalg.solve_triangular(r_a, d_b, upper=True, left=False)
    y = torch.linalg.solve_triangular(r_b.mT, d_a, upper=False).mT
    x_in, y_in = q_b.mT @ x, q_a.mT @ y
    q_b2, r_b2 = torch.linalg.qr(x - q_b @ x_in)
    q_a2, r_a2 = torch.linalg.qr(y - q_a @ y_in)
    core = b.new_zeros(rank + r_b2.shape[0], rank + r_a2.shape[0])
    core[:rank, :rank] = r_b @ r_a.mT - lr * (x_in + y_in.mT) / 2
    core[:rank, rank:] = -lr * r_a2.mT
    core[rank:, :rank] = -lr * r_b2
    left, singular, right = torch.linalg.svd(core, full_matrices=False)
    root = singular[:rank].sqrt()
    new_b = torch.cat([q_b, q_b2], dim=1) @ (left[:, :rank] * root)
    new_a = (root[:, None] * right[:rank]) @ torch.cat([q_a, q_a2], dim=1).mT
    return new_b, new_a
