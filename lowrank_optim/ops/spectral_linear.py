"""y = x (U diag(S) Vᵀ)ᵀ with gradients for S and for the first columns of U and V only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank_optim.ops.autocast import compute_dtype
from lowrank_optim.ops.triplets import Triplets

# Rows of G that exist at a time: a quarter, so that the GEMMs stay large and the block stays below W.
BLOCKS = 4


def spectral_linear(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, u_frozen: Tensor, v_frozen: Tensor, *, enhanced: bool
) -> Tensor:
    """A linear layer whose weight is a sum of q singular triplets, of which r train as vectors.

        H = x [V V'],  y = (H ∘ S) [U U']ᵀ                            few tokens
        P = g [U U'],  dx = (P ∘ S) [V V']ᵀ,  dS = Σ_t P ∘ H,  dU = gᵀ H_r,  dV = xᵀ P_r

        W = [U U'] diag(S) [V V']ᵀ,  y = x Wᵀ                         many
        dx = g W,  G = gᵀ x,  dS = Σ_i [U U'] ∘ G [V V'],  dU = G V,  dV = Gᵀ U

    Which of the two takes fewer FLOPs is chosen by :func:`through_weight`. Saved are references to x and the
    parameters; W exists for one layer at a time, of G a block of rows. Under autocast all products are of the autocast
    dtype, as ``torch.nn.functional.linear``'s are.

    Args:
        x: (..., n).
        u: U, (m, r), trained.
        s: S, (q,), trained; the first r belong to u and v.
        v: V, (n, r), trained.
        u_frozen: U', (m, q - r), without gradient.
        v_frozen: V', (n, q - r), without gradient.
        enhanced: dU and dV as above (Zhao et al. 2024, arXiv 2405.15481); otherwise the true gradients, which are
            these times S_r.

    Returns:
        (..., m).
    """
    y: Tensor = _SpectralLinear.apply(x, u, s, v, u_frozen, v_frozen, enhanced)  # type: ignore[no-untyped-call]
    return y


def through_weight(tokens: int, m: int, n: int, q: int) -> bool:
    """Whether a forward and a backward pass multiply less with W in between than with its parts alone."""
    return 3 * m * n * (tokens + q) < tokens * q * (2 * m + 3 * n)


class _SpectralLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor, u_frozen: Tensor, v_frozen: Tensor, enhanced: bool
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, u, s, v, u_frozen, v_frozen)
        ctx.enhanced = enhanced
        # Transient casts: what is saved are the parameters themselves.
        dtype = compute_dtype(u)
        x, u, s, v, u_frozen, v_frozen = (t.to(dtype) for t in (x, u, s, v, u_frozen, v_frozen))
        m, n, r, q = u.shape[0], v.shape[0], u.shape[1], s.numel()
        ctx.through_weight = through_weight(x.numel() // n, m, n, q)
        if ctx.through_weight:
            return functional.linear(x, _weight(Triplets(u, s, v, u_frozen, v_frozen)))
        y = ((x @ v) * s[:r]) @ u.mT
        if r < q:
            y = y + ((x @ v_frozen) * s[r:]) @ u_frozen.mT
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        dtypes = [t.dtype for t in saved]
        x, *rest = (t.to(grad.dtype) for t in saved)
        parts, shape = Triplets(*rest), x.shape
        x, grad = x.reshape(-1, shape[-1]), grad.reshape(-1, grad.shape[-1])
        gradients = _through_weight if ctx.through_weight else _through_parts
        dx, du, ds, dv = gradients(grad, x, parts, ctx.needs_input_grad[:4])
        if not ctx.enhanced:
            scale = parts.s[: parts.u.shape[1]]
            du = None if du is None else du * scale
            dv = None if dv is None else dv * scale
        grads = (None if dx is None else dx.reshape(shape), du, ds, dv)
        return (*(None if g is None else g.to(d) for g, d in zip(grads, dtypes)), None, None, None)


def _weight(parts: Triplets) -> Tensor:
    u, s, v, u_frozen, v_frozen = parts
    r = u.shape[1]
    return torch.addmm((u * s[:r]) @ v.mT, u_frozen * s[r:], v_frozen.mT)


def _through_parts(
    grad: Tensor, x: Tensor, parts: Triplets, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dU, dS and dV (enhanced) from x and g alone."""
    u, s, v, u_frozen, v_frozen = parts
    need_x, need_u, need_s, need_v = needs
    r = u.shape[1]
    p = grad @ u
    # Computed anew: keeping it would cost T q values a layer.
    h = x @ v if need_u or need_s else None
    dx = (p * s[:r]) @ v.mT if need_x else None
    du = grad.mT @ h if h is not None and need_u else None
    dv = x.mT @ p if need_v else None
    ds = [_column_dots(p, h)] if h is not None and need_s else []
    if r < s.numel() and (need_x or need_s):
        p = grad @ u_frozen
        if dx is not None:
            dx = dx + (p * s[r:]) @ v_frozen.mT
        if need_s:
            ds.append(_column_dots(p, x @ v_frozen))
    return dx, du, torch.cat(ds) if ds else None, dv


def _through_weight(
    grad: Tensor, x: Tensor, parts: Triplets, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dU, dS and dV (enhanced) from W and from blocks of rows of G."""
    u, s, v, u_frozen, v_frozen = parts
    need_x, *need_parts = needs
    dx = grad @ _weight(parts) if need_x else None
    if not any(need_parts):
        return dx, None, None, None
    m, r = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    du = torch.empty_like(u)
    ds, dv = (t.new_zeros(t.shape, dtype=wide) for t in (s, v))
    size = -(-m // BLOCKS)
    for start in range(0, m, size):
        rows = slice(start, start + size)
        G = grad[:, rows].mT @ x
        du[rows] = G @ v
        dv += G.mT @ u[rows]
        ds[:r] += _column_dots(u[rows], du[rows])
        ds[r:] += _column_dots(u_frozen[rows], G @ v_frozen)
    return dx, *(d if need else None for d, need in zip((du, ds, dv), need_parts))


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    # Thousands of rows are summed: in fp32 whatever the dtype.
    return (a * b).sum(dim=0, dtype=torch.promote_types(a.dtype, torch.float32))
