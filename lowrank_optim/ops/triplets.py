"""Singular triplets in two parts, a trained and a frozen one: compose, decompose, draw a sample, swap it in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """The parts of W = Σ_i s_i u_i v_iᵀ (m, n); triplet i < r is trained, the others are frozen but for s_i.

    Attributes:
        u: (m, r), trained.
        s: (q,), trained.
        v: (n, r), trained.
        u_frozen: (m, q - r).
        v_frozen: (n, q - r).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    u_frozen: Tensor
    v_frozen: Tensor


def compose(parts: Triplets) -> Tensor:
    """W (m, n) in fp32 or wider."""
    u, s, v, u_frozen, v_frozen = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in parts)
    return (torch.cat([u, u_frozen], dim=1) * s) @ torch.cat([v, v_frozen], dim=1).mT


def decompose_(parts: Triplets, weight: Tensor) -> bool:
    """Write the singular value decomposition of ``weight`` (m, n) into ``parts``, largest values first.

    Returns:
        False where there is none (not finite, no convergence); the parts are then as they were.
    """
    try:
        u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return False
    if not bool(s.isfinite().all()):
        return False
    r = parts.u.shape[1]
    for part, value in zip(parts, (u[:, :r], s, vh[:r].mT, u[:, r:], vh[r:].mT)):
        part.copy_(value)
    return True


def draw_slots(s: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor | None:
    """Draw ``count`` distinct triplets with probabilities (1/q + s_i / Σ s) / 2, one after the other.

    Returns:
        Their slots, ascending, int64 (count,) on the CPU; None where ``s`` is not finite.
    """
    p = s.detach().to("cpu", torch.float64)
    total = p.sum()
    if not bool(total.isfinite()):
        return None
    # All zero: uniform.
    p = (1 / p.numel() + p / total.clamp_min(torch.finfo(p.dtype).tiny)) / 2
    return torch.multinomial(p, count, replacement=False, generator=generator).sort().values


def activate_(parts: Triplets, slots: Tensor, *beside_s: Tensor) -> None:
    """Make the triplets at ``slots`` (r,) the trained ones; W stays, for every other one goes where one came from.

    Args:
        slots: distinct, from :func:`draw_slots`.
        beside_s: further (q,) tensors in the order of s, such as its moments.
    """
    r = parts.u.shape[1]
    stays = torch.zeros(r, dtype=torch.bool, device=slots.device)
    stays[slots[slots < r]] = True
    device = parts.u.device
    leaving, coming = (~stays).nonzero().flatten().to(device), slots[slots >= r].to(device)
    for trained, frozen in ((parts.u, parts.u_frozen), (parts.v, parts.v_frozen)):
        columns = trained[:, leaving]
        trained[:, leaving] = frozen[:, coming - r].to(trained.dtype)
        frozen[:, coming - r] = columns.to(frozen.dtype)
    for vector in (parts.s, *beside_s):
        values = vector[leaving]
        vector[leaving] = vector[coming]
        vector[coming] = values


def normalize_columns_(matrix: Tensor) -> None:
    """Divide every column by its length, which is taken in fp32 or wider; a zero column stays."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
    matrix.div_(norms.clamp_min_(torch.finfo(dtype).tiny))
