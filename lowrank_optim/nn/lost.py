"""LOST: low-rank factors plus a few dense input channels, both from the SVD of a dense start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_optim.nn.base import (
    Parameterization,
    ParameterizedLinear,
    check_rank,
    empty_factors,
    normal_,
    working_dtype,
)
from lowrank_optim.nn.lowrank import factors_through_silu, scaled_product
from lowrank_optim.nn.sltrain import check_sparsity
from lowrank_optim.ops.lost import lost_linear
from lowrank_optim.optim.validation import check_choice, check_positive_int, check_range


class LOSTLinear(ParameterizedLinear):
    """The layer of :class:`LOST`.

    Parameters ``A`` (r, n), ``B`` (m, r), ``C`` (m, k), ``bias`` (m,); buffer ``channels`` I, int32 (k,), sorted.
    """

    channels: Tensor

    options: LOST

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        check_rank(self.options.rank, self.in_features, self.out_features)
        if self.options.rank == min(self.in_features, self.out_features):
            raise ValueError(
                f"Invalid rank: {self.options.rank}, expected less than the smaller side of a {self.out_features} x "
                f"{self.in_features} weight: the remaining singular values choose the channels"
            )
        self.nonlinear = self.options.act != "none"
        count = max(1, int(self.options.sparsity * self.in_features))
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)
        self.C = nn.Parameter(torch.empty(self.out_features, count, device=device, dtype=dtype))
        self.register_buffer("channels", torch.empty(count, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return lost_linear(
            x, self.B, self.A, self.C, self.bias, self.channels, gamma=self.options.gamma, silu=self.nonlinear
        )

    def composed(self) -> Tensor:
        gamma = self.options.gamma
        W = scaled_product(self.B, self.A, gamma)
        return W.index_add_(1, self.channels, self.C.to(W.dtype), alpha=1 - gamma).to(self.A.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        if not self.A.is_meta:
            shape = (self.out_features, self.in_features)
            start = torch.empty(shape, device=self.A.device, dtype=working_dtype(self.A.dtype))
            normal_(start, self.options.std, generator)
            self._split_(start)

    def fit_(self, weight: Tensor) -> None:
        """The best rank-r approximation, with silu in the range where it is nearly linear, and the exact channels I."""
        weight = weight.to(working_dtype(weight.dtype))
        b, a = self._split_(weight)
        gamma, chosen = self.options.gamma, self.channels.long()
        if gamma < 1:
            low = b @ a[:, chosen] if gamma > 0 else 0
            self.C.copy_((weight[:, chosen] - low) / (1 - gamma))
        if gamma > 0:
            b, a = b / gamma**0.5, a / gamma**0.5
        if self.nonlinear:
            b, a = factors_through_silu(b, a)
        self.B.copy_(b)
        self.A.copy_(a)

    def _split_(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Fill every part from a dense weight; the factors once more, unrounded."""
        rank = self.options.rank
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        root = singular[:rank].sqrt()
        b, a = left[:, :rank] * root, root[:, None] * right[:rank]
        self.B.copy_(b)
        self.A.copy_(a)
        tail = slice(rank, rank + self.options.tail_rank)
        scores = (singular[tail, None] * right[tail]).square().sum(0)
        # A stable sort: equal scores go by channel, on every device.
        chosen = scores.argsort(descending=True, stable=True)[: self.channels.numel()].sort().values
        self.channels.copy_(chosen)
        self.C.copy_(weight[:, chosen])
        return b, a


@dataclass(frozen=True)
class LOST(Parameterization):
    """y = gamma B act(A x) + (1 - gamma) C x_I + b, with I a fixed set of input channels (arXiv 2508.02668).

        W0 ~ N(0, std²) = U Σ Vᵀ
        B = U_r sqrt(Σ_r)   A = sqrt(Σ_r) V_rᵀ
        score_j = norm of column j of what the singular values r+1 ... r+tail_rank make up
        I = the channels with the largest scores   C = W0[:, I]

    At the start the layer is smaller than W0: by gamma and by the energy that r directions hold, and by
    about another half with the activation.

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        sparsity: the share of input channels in I, above 0 and below 1; at least one channel is taken.
        gamma: the share of the low-rank part, in [0, 1]; published runs lie between 0.5 and 0.9.
        act: "silu", or "none" for a layer that can be merged.
        tail_rank: how many singular values after the first r score the channels.
        std: deviation of the dense start.

    Raises:
        ValueError: an option out of range; on building, a rank that is not below the smaller side of the
            layer, for then no singular values remain to score the channels.

    Deviations: written from the paper's reviews and related code of its authors, since no code of the
    paper itself is published; gamma and sparsity are the authors' later settings.
    """

    layer = LOSTLinear
    rank: int = 128
    sparsity: float = 0.01
    gamma: float = 0.7
    act: str = "silu"
    tail_rank: int = 256
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_sparsity(self.sparsity)
        check_range("gamma", self.gamma, low=0.0, high=1.0)
        check_choice("act", self.act, ("silu", "none"))
        check_positive_int("tail_rank", self.tail_rank)
        check_range("std", self.std, low=0.0)
