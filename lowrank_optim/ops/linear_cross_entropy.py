"""Head and cross entropy in one, a part of the logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_optim.ops.autocast import compute_dtype

# Rows of logits at a time: enough for GEMMs at full speed, 65 MB of fp32 logits for 32,000 words.
CHUNK = 512

REDUCTIONS = ("sum", "mean", "none")


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of every row; ``keep`` is False where it counts as zero."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor, chunk: int) -> Tensor:
        dtype = compute_dtype(weight)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        # log Σ exp z in two parts: their sum would lose the small one where logits are large.
        largest, rest = torch.empty_like(loss), torch.empty_like(loss)
        cast = weight.to(dtype)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows].to(dtype) @ cast.t()).to(wide)
            largest[rows] = logits.amax(1)
            logits.sub_(largest[rows, None])
            loss[rows] = -logits.gather(1, targets[rows, None]).squeeze(1)
            rest[rows] = logits.exp_().sum(1).log_()
        ctx.save_for_backward(hidden, weight, targets, keep, largest, rest)
        ctx.chunk, ctx.dtype = chunk, dtype
        # Not in place: compiled by torch 2.11, a result that was written to has a gradient of zero.
        return (loss + rest).masked_fill(~keep, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, keep, largest, rest = ctx.saved_tensors
        (rows, width), words = hidden.shape, weight.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad = torch.where(keep, grads[0], 0)[:, None]
        x = hidden.to(ctx.dtype)
        d_hidden = torch.zeros(rows, width, dtype=rest.dtype, device=x.device) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        # With log Σ exp z known, the logits can be cut along the vocabulary: every row of the weight's gradient is
        # then one product, rounded once, where a sum over chunks of tokens would be rounded to bf16 at every chunk.
        size = max(1, min(words, ctx.chunk * words // max(rows, 1)))
        for start in range(0, words, size):
            part = weight[start : start + size].to(ctx.dtype)
            p = (x @ part.t()).to(rest.dtype).sub_(largest[:, None]).sub_(rest[:, None]).exp_()
            local = (targets - start)[:, None]
            inside = (local >= 0) & (local < part.shape[0])
            p.scatter_add_(1, local.clamp(0, part.shape[0] - 1), -inside.to(p.dtype))
            p = p.mul_(grad).to(ctx.dtype)
            if d_hidden is not None:
                d_hidden += p @ part
            if d_weight is not None:
                d_weight[start : start + size] = p.t() @ x
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int = CHUNK,
    reduction: str = "sum",
) -> Tensor:
    """``cross_entropy(hidden @ weightᵀ, targets)`` of which ``chunk`` rows of logits exist at a time.

        z = hidden weightᵀ ;  n_t = log Σ_v exp z_tv
        loss_t = n_t - z_t,target
        p_tv = (exp(z_tv - n_t) - [v = target_t]) g_t
        d_hidden = p weight ;  d_weight = pᵀ hidden

    The backward pass computes the logits again, 2 T V d FLOPs, and keeps two numbers a token from the forward pass.
    Under autocast the products are of the autocast dtype; the softmax is fp32, or fp64 for fp64.

    Args:
        hidden: (T, d).
        weight: (V, d).
        targets: (T,), int64, in [0, V) or ``ignore_index``.
        ignore_index: the target of tokens that count neither in the loss nor in the mean.
        chunk: rows of logits, at least 1; the backward pass has as many logits at a time.
        reduction: "sum", "mean" over the tokens that count (NaN for none), or "none".

    Returns:
        The loss in fp32 or wider, a scalar, or (T,) for "none".

    Raises:
        ValueError: shapes that do not fit, a chunk below 1, an unknown reduction.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"Invalid hidden and targets: shapes {shapes}, expected (T, d) and (T,)")
    if chunk < 1:
        raise ValueError(f"Invalid chunk: {chunk}, expected a positive int")
    if reduction not in REDUCTIONS:
        raise ValueError(f"Invalid reduction: {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
    keep = targets != ignore_index
    safe = torch.where(keep, targets, 0)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, safe, keep, chunk)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / keep.sum() if reduction == "mean" else total
