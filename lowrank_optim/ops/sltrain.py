"""SLTrain's weight W = scale B A + S and its gradients, without a dense gradient.

``index`` and ``row_pointers`` hold the support of S as :mod:`lowrank_optim.ops.support` packs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank_optim.ops import pick
from lowrank_optim.ops.autocast import compute_dtype
from lowrank_optim.ops.sddmm import BLOCKS, sddmm, take_rows
from lowrank_optim.ops.support import positions


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
    # From G it takes 4mnr FLOPs, from x and g directly 4Tr(m + n).
    if x.shape[0] * (m + n) <= m * n:
        dB = grad.t() @ (x @ A.t())
        dA = (grad @ B).t() @ x
        return dB.mul_(scale), dA.mul_(scale), _sddmm(grad, x, index, row_pointers, count)
    flat = positions(index, row_pointers, (m, n), count)
    # The blocks' contributions to dA are summed in fp32: bf16 would round between them.
    dA = torch.zeros(r, n, dtype=torch.promote_types(A.dtype, torch.float32), device=A.device)
    dB = torch.empty_like(B)
    dv = grad.new_zeros(count)
    size = -(-m // BLOCKS)
    for start in range(0, m, size):
        rows = slice(start, min(start + size, m))
        G = grad[:, rows].t() @ x
        torch.mm(G, A.t(), out=dB[rows])
        dA += B[rows].t() @ G
        dv = take_rows(dv, flat, G, start)
    return dB.mul_(scale), dA.mul_(scale).to(A.dtype), dv


# On CUDA the two operations that have kernels are operators, which a compiler takes as they are; on other devices it
# sees through them.
@torch.library.custom_op(
    "lowrank_optim::sltrain_weight",
    mutates_args=(),
    schema="(Tensor B, Tensor A, Tensor values, Tensor index, Tensor row_pointers, float scale) -> Tensor",
)
def sltrain_weight_operator(
    B: Tensor, A: Tensor, values: Tensor, index: Tensor, row_pointers: Tensor, scale: float
) -> Tensor:
    return pick(sltrain_weight, None, B.device)(B, A, values, index, row_pointers, scale=scale)


@sltrain_weight_operator.register_fake
def _(B: Tensor, A: Tensor, values: Tensor, index: Tensor, row_pointers: Tensor, scale: float) -> Tensor:
    return B.new_empty(B.shape[0], A.shape[1])


@torch.library.custom_op(
    "lowrank_optim::sddmm",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor index, Tensor row_pointers, int count) -> Tensor",
)
def sddmm_operator(grad: Tensor, x: Tensor, index: Tensor, row_pointers: Tensor, count: int) -> Tensor:
    return pick(sddmm, None, grad.device)(grad, x, index, row_pointers, count=count)


@sddmm_operator.register_fake
def _(grad: Tensor, x: Tensor, index: Tensor, row_pointers: Tensor, count: int) -> Tensor:
    return grad.new_empty(count)


def _weight(B: Tensor, A: Tensor, values: Tensor, index: Tensor, row_pointers: Tensor, scale: float) -> Tensor:
    if B.is_cuda:
        weight: Tensor = sltrain_weight_operator(B, A, values, index, row_pointers, scale)
        return weight
    return sltrain_weight(B, A, values, index, row_pointers, scale=scale)


def _sddmm(grad: Tensor, x: Tensor, index: Tensor, row_pointers: Tensor, count: int) -> Tensor:
    if grad.is_cuda:
        entries: Tensor = sddmm_operator(grad, x, index, row_pointers, count)
        return entries
    return sddmm(grad, x, index, row_pointers, count=count)


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
        W = _weight(B, A, values, index, row_pointers, scale)
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
            W = _weight(B, A, values.to(ctx.dtype), index, row_pointers, ctx.scale)
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
