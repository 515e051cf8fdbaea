"""y = x (U diag(S) Vᵀ)ᵀ with gradients for S and for the first columns of U and V only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lowrank_optim.ops.autocast import compute_dtype


def spectral_linear(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, u_frozen: Tensor, v_frozen: Tensor, *, enhanced: bool
) -> Tensor:
    """A linear layer whose weight is a sum of q singular triplets, of which r train as vectors.

        H = x [V V'],  y = (H ∘ S) [U U']ᵀ
        P = g [U U'],  dx = (P ∘ S) [V V']ᵀ,  dS = Σ_t P ∘ H,  dU = gᵀ H_r,  dV = xᵀ P_r

    Neither the weight nor its gradient is ever formed; H is computed again in the backward pass.
    Under autocast all products are of the autocast dtype, as ``torch.nn.functional.linear``'s are.

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
        r = u.shape[1]
        y = ((x @ v) * s[:r]) @ u.mT
        if r < s.numel():
            y = y + ((x @ v_frozen) * s[r:]) @ u_frozen.mT
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        dtypes = [t.dtype for t in saved]
        x, u, s, v, u_frozen, v_frozen = (t.to(grad.dtype) for t in saved)
        shape, r = x.shape, u.shape[1]
        x, grad = x.reshape(-1, shape[-1]), grad.reshape(-1, grad.shape[-1])
        need_x, need_u, need_s, need_v = ctx.needs_input_grad[:4]

        p = grad @ u
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
        if not ctx.enhanced:
            du = None if du is None else du * s[:r]
            dv = None if dv is None else dv * s[:r]
        grads = (None if dx is None else dx.reshape(shape), du, torch.cat(ds) if ds else None, dv)
        return (*(None if g is None else g.to(d) for g, d in zip(grads, dtypes)), None, None, None)


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    # Thousands of tokens are summed: in fp32 whatever the dtype.
    return (a * b).sum(dim=0, dtype=torch.promote_types(a.dtype, torch.float32))
