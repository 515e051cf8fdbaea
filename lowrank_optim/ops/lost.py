"""LOST's layer: a low-rank part and a few dense input channels in one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowrank_optim.ops.autocast import compute_dtype


def lost_features(h: Tensor, x: Tensor, channels: Tensor, *, silu: bool) -> Tensor:
    """[u, x_I] (T, r + k), the features that LOST mixes: u = silu(h) or h, and the chosen channels of x.

    Args:
        h: x Aᵀ, (T, r).
        x: (T, n).
        channels: I, int32 (k,).
    """
    # Under autocast h is narrower than x.
    return torch.cat([functional.silu(h) if silu else h, x.index_select(1, channels).to(h.dtype)], dim=1)


def lost_mixer(B: Tensor, C: Tensor, *, gamma: float) -> Tensor:
    """[gamma B, (1 - gamma) C] (m, r + k), so that y = [u, x_I] of it transposed is one matrix product."""
    return torch.cat([gamma * B, (1 - gamma) * C], dim=1)


class _LOST(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, C: Tensor, bias: Tensor | None, channels: Tensor,
        gamma: float, silu: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, B, A, C, channels)
        ctx.gamma, ctx.silu, ctx.dtype = gamma, silu, compute_dtype(B)
        B, A, C = (tensor.to(ctx.dtype) for tensor in (B, A, C))
        flat = x.reshape(-1, x.shape[-1])
        features = lost_features(flat @ A.t(), flat, channels, silu=silu)
        y = functional.linear(features, lost_mixer(B, C, gamma=gamma), bias)
        return y.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, B, A, C, channels = ctx.saved_tensors
        needs_x, needs_B, needs_A, needs_C, needs_bias = ctx.needs_input_grad[:5]
        shape, rank, gamma = x.shape, A.shape[0], ctx.gamma
        B, A, C = (tensor.to(ctx.dtype) for tensor in (B, A, C))
        x = x.reshape(-1, shape[-1]).to(ctx.dtype)
        g = grads[0].reshape(-1, B.shape[0])
        dx = dB = dA = dC = None
        # Computed anew: keeping it would cost T r values a layer, where x is mostly shared between layers.
        h = x @ A.t()
        if needs_B or needs_C:
            mixed = g.t() @ lost_features(h, x, channels, silu=ctx.silu)
            # Copies: views would keep the gradients of both alive as one, with gaps between their rows.
            dB, dC = gamma * mixed[:, :rank], (1 - gamma) * mixed[:, rank:]
            del mixed
        if needs_x or needs_A:
            dfeatures = g @ lost_mixer(B, C, gamma=gamma)
            dh = dfeatures[:, :rank]
            if ctx.silu:
                dh = torch.ops.aten.silu_backward(dh, h)
            del h
            if needs_A:
                dA = dh.t() @ x
            if needs_x:
                dx = (dh @ A).index_add_(1, channels, dfeatures[:, rank:]).view(shape)
        return (
            dx, dB if needs_B else None, dA, dC if needs_C else None,
            g.sum(0) if needs_bias else None, None, None, None,
        )  # fmt: skip


def lost_linear(
    x: Tensor, B: Tensor, A: Tensor, C: Tensor, bias: Tensor | None, channels: Tensor, *, gamma: float, silu: bool
) -> Tensor:
    """y = gamma act(x Aᵀ) Bᵀ + (1 - gamma) x_I Cᵀ + b, with x_I the channels of x in ``channels``.

    Saved for the backward pass: x, the parameters and the channels, none of them copied.

    Args:
        x: (..., n).
        B: (m, r).
        A: (r, n).
        C: (m, k), the columns of the sparse part.
        bias: (m,) or None.
        channels: I, int32 (k,), sorted.
        gamma: the share of the low-rank part, in [0, 1].
        silu: whether act is silu; else there is none.
    """
    y: Tensor = _LOST.apply(x, B, A, C, bias, channels, gamma, silu)  # type: ignore[no-untyped-call]
    return y
