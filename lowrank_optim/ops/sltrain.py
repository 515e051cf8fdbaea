"""SLTrain's weight W = scale B A + S and its gradients, without a dense gradient.

``index`` and ``row_pointers`` hold the support of S as :mod:`lowrank_optim.ops.support` packs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank_optim.ops.autocast import compute_dtype
from lowrank_optim.ops.support import positions

# Rows of G = gᵀ x that exist at a time: a quarter, so that the GEMMs stay large and the block stays below
# W, which the backward pass has freed by then.
BLOCKS = 4


def sltrain_weight(
    B: Tensor, A: Tensor, values: Tensor, index: Tensor, row_pointers: Tensor, *, scale: float
) -> Tensor:
    """W = scale B A + S, shape (m, n); an entry of the support gets both parts.

    Args:
        B: (m, r).
        A: (r, n).
        values: (count,), the entries of S in the order of their positions.
        index, row_pointers: the support of S.
    """
    W = B.new_empty(B.shape[0], A.shape[1])
    torch.addmm(W, B, A, beta=0, alpha=scale, out=W)
    # A view of W as a vector; positions are unique, so that adding needs no order.
    W.view(-1).index_add_(0, positions(index, row_pointers, (W.shape[0], W.shape[1]), values.numel()), values)
    return W


def sltrain_gradients(
    grad: Tensor, x: Tensor, B: Tensor, A: Tensor, index: Tensor, row_pointers: Tensor, *, count: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of B, A and the values from G = gᵀ x, of which a block of rows exists at a time.

        dB = scale G Aᵀ = scale gᵀ (x Aᵀ)
        dA = scale Bᵀ G = scale (g B)ᵀ x
        dv_k = G[i_k, j_k]

    Args:
        grad: g, (T, m).
        x: (T, n).
        B, A, index, row_pointers, scale: as in :func:`sltrain_weight`.
        count: how many values there are.
    """
    (m, r), n = B.shape, A.shape[1]
    flat = positions(index, row_pointers, (m, n), count)
    # From G it takes 4mnr FLOPs, from x and g directly 4Tr(m + n).
    from_blocks = x.shape[0] * (m + n) > m * n
    # The blocks' contributions to dA are summed in fp32: bf16 would round between them.
    dA = torch.zeros(r, n, dtype=torch.promote_types(A.dtype, torch.float32), device=A.device)
    dB = torch.empty_like(B)
    dv = grad.new_zeros(count)
    if not from_blocks:
        torch.mm(grad.t(), x @ A.t(), out=dB)
        dA.copy_((grad @ B).t() @ x)
    size = -(-m // BLOCKS)
    for start in range(0, m, size):
        rows = slice(start, min(start + size, m))
        G = grad[:, rows].t() @ x
        if from_blocks:
            torch.mm(G, A.t(), out=dB[rows])
            dA += B[rows].t() @ G
        # Every position looks into every block: where a block's positions begin, only the device knows.
        local = flat - start * n
        inside = (local >= 0) & (local < G.numel())
        dv = torch.where(inside, G.view(-1).index_select(0, local.clamp_(0, G.numel() - 1)), dv)
    return dB.mul_(scale), dA.mul_(scale).to(A.dtype), dv


class _SLTrain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, bias: Tensor | None,
        index: Tensor, row_pointers: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        # References to the parameters and to x as it came: q, k and v share it.
        ctx.save_for_backward(x, B, A, values, index, row_pointers)
        ctx.scale, ctx.dtype = scale, compute_dtype(B)
        B, A, values = (tensor.to(ctx.dtype) for tensor in (B, A, values))
        W = sltrain_weight(B, A, values, index, row_pointers, scale=scale)
        return functional.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, B, A, values, index, row_pointers = ctx.saved_tensors
        shape, count = x.shape, values.numel()
        needs_x, needs_B, needs_A, needs_values, needs_bias = ctx.needs_input_grad[:5]
        g = grads[0].reshape(-1, B.shape[0])
        B, A = B.to(ctx.dtype), A.to(ctx.dtype)
        dx = dB = dA = dv = None
        if needs_x:
            W = sltrain_weight(B, A, values.to(ctx.dtype), index, row_pointers, scale=ctx.scale)
            dx = (g @ W).view(shape)
            del W
        if needs_B or needs_A or needs_values:
            x = x.reshape(-1, shape[-1]).to(ctx.dtype)
            dB, dA, dv = sltrain_gradients(g, x, B, A, index, row_pointers, count=count, scale=ctx.scale)
        return (
            dx, dB if needs_B else None, dA if needs_A else None, dv if needs_values else None,
            g.sum(0) if needs_bias else None, None, None, None,
        )  # fmt: skip


def sltrain_linear(
    x: Tensor, B: Tensor, A: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, row_pointers: Tensor,
    *, scale: float,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + b with W of :func:`sltrain_weight`; W exists during the call and during its backward only.

    Saved for the backward pass: x, B, A, the values and the index, none of them copied. Under autocast the
    factors are cast inside.

    Args:
        x: (..., n).
        bias: (m,) or None.
    """
    y: Tensor = _SLTrain.apply(x, B, A, values, bias, index, row_pointers, scale)  # type: ignore[no-untyped-call]
    return y
