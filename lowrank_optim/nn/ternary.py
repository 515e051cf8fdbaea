"""TernaryLowRank: a weight of three values and a gated low-rank path beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowrank_optim.nn.base import Parameterization, ParameterizedLinear, empty_factors, normal_, uniform_, working_dtype
from lowrank_optim.nn.lowrank import balanced_factors, scaled_product
from lowrank_optim.ops.autocast import compute_dtype
from lowrank_optim.optim.validation import check_positive_int, check_range


class TernaryLowRankLinear(ParameterizedLinear):
    """The layer of :class:`TernaryLowRank`.

    Parameters ``weight`` W (m, n), ``A`` (r, n), ``B`` (m, r), ``gate`` θ (), ``bias`` (m,).
    """

    options: TernaryLowRank

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)
        self.gate = nn.Parameter(torch.empty((), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TernaryLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y + linear(linear(x, self.A) * self.gate.tanh(), self.B)

    def composed(self) -> Tensor:
        dtype = working_dtype(self.weight.dtype)
        W = ternary(self.weight, dtype) + scaled_product(self.B, self.A, 1.0) * self.gate.to(dtype).tanh()
        return W.to(self.weight.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        normal_(self.weight, self.options.std, generator)
        uniform_(self.A, self.in_features**-0.5, generator)
        self.B.zero_()
        self.gate.fill_(math.atanh(self.options.gate))

    def fit_(self, weight: Tensor) -> None:
        """The ternary part of the weight, and of what it misses the best rank-r approximation."""
        self.weight.copy_(weight)
        self.gate.fill_(math.atanh(self.options.gate))
        if self.options.gate == 0:
            self.B.zero_()
            return
        dtype = working_dtype(weight.dtype)
        missed = weight.to(dtype) - ternary(self.weight, dtype)
        b, a = balanced_factors(missed / self.options.gate, self.options.rank)
        self.B.copy_(b)
        self.A.copy_(a)


@dataclass(frozen=True)
class TernaryLowRank(Parameterization):
    """y = Q(W) x + tanh(θ) B (A x) + b with Q(W) = γ round(clip(W / γ, -1, 1)) and γ = mean |W| (arXiv 2602.05269).

    W is trained in the dtype of the model; the forward pass sees only its three values, and the gradient of Q(W) goes
    to W as it is (straight-through). W starts as N(0, std²), A as U(±1/sqrt(n)), B as zero: a ternary layer, as
    BitNet b1.58's (arXiv 2402.17764).

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        gate: tanh(θ) at the start, in (-1, 1); θ is one number a layer. Published runs settle near 0.1.
        std: deviation of W at the start.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.

    Deviations: of the paper, Hybrid Gated Flow, little more than the formula is established. The tanh, the start
    of the gate and the rank are chosen here. Left out are its differential attention, the quantized activations of
    BitNet, and the penalty, the learning rate and the warm-up of the gates: ``layer.gate.requires_grad_(False)``
    freezes one. Training takes the memory of a dense layer and of the factors; what is small is the trained model.
    """

    layer = TernaryLowRankLinear
    rank: int = 8
    gate: float = 0.1
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_range("std", self.std, low=0.0)
        if isinstance(self.gate, bool) or not isinstance(self.gate, (int, float)) or not -1 < self.gate < 1:
            raise ValueError(f"Invalid gate: {self.gate!r}, expected a number in (-1, 1)")


def ternary(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Q(W), computed in fp32 or wider and rounded once to ``dtype``."""
    wide = weight.to(working_dtype(weight.dtype))
    gamma = wide.abs().mean()
    # Where W is zero, so is Q(W).
    signs = (wide / gamma.clamp_min(torch.finfo(wide.dtype).tiny)).clamp_(-1, 1).round_()
    return signs.mul_(gamma).to(dtype)


class _TernaryLinear(torch.autograd.Function):
    """x Q(W)ᵀ + b; Q(W) is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, ternary(weight, compute_dtype(weight)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        g = grads[0].reshape(-1, weight.shape[0])
        dx = (g @ ternary(weight, g.dtype)).view(x.shape) if needs_x else None
        dW = g.t() @ x.reshape(-1, weight.shape[1]).to(g.dtype) if needs_weight else None
        return dx, dW, g.sum(0) if needs_bias else None
