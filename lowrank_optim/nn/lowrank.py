"""W = s B A and its relatives: LowRank, CoLA, LoRA, ReLoRA and LORO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, silu

from lowrank_optim.nn.base import Parameterization, ParameterizedLinear, empty_factors, normal_, uniform_, working_dtype
from lowrank_optim.optim.validation import check_choice, check_positive_int, check_range

INITS = ("normal", "spectral", "kaiming", "xavier")

# Rows of A after from_weight_ of a CoLA layer: for inputs of variance 1 the hidden h has this deviation, and
# silu(h) = h/2 + h^2/4 - ... is linear up to a relative error of h/2.
_LINEAR_RANGE = 0.1


class LowRankLinear(ParameterizedLinear):
    """The layer of :class:`LowRank`: parameters ``A`` (r, n), ``B`` (m, r), ``bias`` (m,)."""

    options: LowRank

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.scale = scale_of(self.options.alpha, self.options.rank)
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(scaled(linear(x, self.A), self.scale), self.B, self.bias)

    def composed(self) -> Tensor:
        return scaled_product(self.B, self.A, self.scale).to(self.A.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        m, n, r = self.out_features, self.in_features, self.options.rank
        if self.options.init == "kaiming":
            uniform_(self.A, n**-0.5, generator)
            uniform_(self.B, r**-0.5, generator)
        elif self.options.init == "xavier":
            normal_(self.A, (2 / (n + r)) ** 0.5, generator)
            normal_(self.B, (2 / (m + r)) ** 0.5, generator)
        elif self.options.init == "spectral":
            if not self.A.is_meta:
                dense = torch.empty(m, n, device=self.A.device, dtype=working_dtype(self.A.dtype))
                normal_(dense, self.options.std, generator)
                self.from_weight_(dense)
        else:
            # An entry of s B A sums r products: std² = s² r σ⁴.
            std = (self.options.std / (self.scale * r**0.5)) ** 0.5
            normal_(self.A, std, generator)
            normal_(self.B, std, generator)

    def fit_(self, weight: Tensor) -> None:
        """The best rank-r approximation, the singular values split evenly between the factors."""
        b, a = balanced_factors(weight, self.options.rank)
        self.B.copy_(b / self.scale**0.5)
        self.A.copy_(a / self.scale**0.5)


@dataclass(frozen=True)
class LowRank(Parameterization):
    """y = s B (A x) + b with s = alpha / rank: two trained factors in place of the weight.

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        alpha: numerator of s; None stands for s = 1.
        init: how the factors start.

            - "normal": both Gaussian, such that the entries of s B A have the deviation ``std``.
            - "spectral": the best rank-r approximation of a dense N(0, std²), split evenly.
            - "kaiming": U(±1/sqrt(n)) and U(±1/sqrt(r)), as in the code of arXiv 2505.22922.
            - "xavier": N(0, 2/(n + r)) and N(0, 2/(m + r)), as in LORO (arXiv 2502.00018).
        std: deviation of a dense initial weight.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.
    """

    layer = LowRankLinear
    rank: int = 128
    alpha: float | None = None
    init: str = "normal"
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_alpha(self.alpha)
        check_choice("init", self.init, INITS)
        check_range("std", self.std, low=0.0)


@dataclass(frozen=True)
class LORO(LowRank):
    """The factors of LORO: a :class:`LowRank` layer with s = 1 and Xavier-normal factors.

    What makes it LORO is the optimizer, :class:`lowrank_optim.LOROAdamW` (arXiv 2502.00018).
    """

    init: str = "xavier"


class CoLALinear(ParameterizedLinear):
    """The layer of :class:`CoLA`: parameters ``A`` (r, n), ``B`` (m, r), ``bias`` (m,)."""

    options: CoLA

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.nonlinear = self.options.act != "none"
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.A)
        return linear(silu(hidden) if self.nonlinear else hidden, self.B, self.bias)

    def composed(self) -> Tensor:
        return scaled_product(self.B, self.A, 1.0).to(self.A.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        std = (self.options.rank * (self.out_features + self.in_features)) ** -0.25
        normal_(self.A, std, generator)
        normal_(self.B, std, generator)

    def fit_(self, weight: Tensor) -> None:
        """The best rank-r approximation, with the activation in the range where it is nearly linear."""
        b, a = balanced_factors(weight, self.options.rank)
        if self.nonlinear:
            b, a = factors_through_silu(b, a)
        self.B.copy_(b)
        self.A.copy_(a)


@dataclass(frozen=True)
class CoLA(Parameterization):
    """y = B act(A x) + b, an activation between the factors (arXiv 2502.10940).

    Both factors start Gaussian with deviation r^(-1/4) (m + n)^(-1/4). Published runs of 350M parameters and
    more have no other activation in the MLP: configure the model with ``hidden_act="linear"`` for these.

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        act: "silu", or "none" for plain factors, which can be merged.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.
    """

    layer = CoLALinear
    rank: int = 128
    act: str = "silu"

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_choice("act", self.act, ("silu", "none"))


class LoRALinear(ParameterizedLinear):
    """The layer of :class:`LoRA`: ``weight`` (m, n) without gradient, ``A`` (r, n), ``B`` (m, r), ``bias`` (m,)."""

    options: LoRA

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.scale = scale_of(self.options.alpha, self.options.rank)
        weight = torch.empty(self.out_features, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(dropout(x, self.options.dropout, self.training), self.A)
        return linear(x, self.weight, self.bias) + linear(scaled(hidden, self.scale), self.B)

    def composed(self) -> Tensor:
        return scaled_product(self.B, self.A, self.scale).add_(self.weight).to(self.weight.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        normal_(self.weight, self.options.std, generator)
        self.reset_factors_(generator)

    @torch.no_grad()
    def reset_factors_(self, generator: torch.Generator | None = None) -> None:
        """Draw A anew and set B to zero, so that B A = 0; never both zero, for then nothing would train."""
        uniform_(self.A, self.in_features**-0.5, generator)
        self.B.zero_()

    def fit_(self, weight: Tensor) -> None:
        """Exact: the weight becomes W0 and B becomes zero."""
        self.weight.copy_(weight)
        self.B.zero_()


@dataclass(frozen=True)
class LoRA(Parameterization):
    """y = W0 x + s B (A drop(x)) + b with a frozen dense W0 and s = alpha / rank (arXiv 2106.09685).

    W0 starts as N(0, std²) unless a weight is kept; A as U(±1/sqrt(n)), B as zero.

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        alpha: numerator of s.
        dropout: share of the inputs of A that is dropped in training; pretraining comparisons use 0.05.
        std: deviation of a dense initial weight.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.
    """

    layer = LoRALinear
    rank: int = 128
    alpha: float | None = 32
    dropout: float = 0.0
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_alpha(self.alpha)
        check_range("dropout", self.dropout, low=0.0, high=1.0, high_open=True)
        check_range("std", self.std, low=0.0)


class ReLoRALinear(LoRALinear):
    """The layer of :class:`ReLoRA`; :meth:`merge_and_restart_` is one restart."""

    @torch.no_grad()
    def merge_and_restart_(self, generator: torch.Generator | None = None) -> None:
        """W0 += s B A, rounded once; A is drawn anew and B becomes zero."""
        self.weight.copy_(self.dense_weight())
        self.reset_factors_(generator)


@dataclass(frozen=True)
class ReLoRA(LoRA):
    """LoRA whose factors are merged into W0 and drawn anew every so many updates (arXiv 2307.05695).

    The restarts are :class:`lowrank_optim.nn.MergeAndRestart`'s; without it this is LoRA.
    """

    layer = ReLoRALinear


def check_alpha(alpha: float | None) -> None:
    """Raise ValueError unless alpha is None or a positive number."""
    if alpha is None:
        return
    check_range("alpha", alpha, low=0.0)
    if alpha == 0:
        raise ValueError(f"Invalid alpha: {alpha}, expected a positive number or None")


def scale_of(alpha: float | None, rank: int) -> float:
    """s = alpha / rank, 1 without alpha."""
    return 1.0 if alpha is None else alpha / rank


def scaled(hidden: Tensor, scale: float) -> Tensor:
    """scale * hidden, and no copy where the scale is 1."""
    return hidden if scale == 1.0 else hidden * scale


def scaled_product(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """scale * B A in fp32 or wider, a new tensor (m, n)."""
    dtype = working_dtype(a.dtype)
    return (b.to(dtype) @ a.to(dtype)).mul_(scale)


def balanced_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(S) (m, rank) and sqrt(S) Vᵀ (rank, n) of the ``rank`` largest singular triplets, fp32 or wider."""
    left, singular, right = torch.linalg.svd(weight.to(working_dtype(weight.dtype)), full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def factors_through_silu(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with B silu(A x) nearly the given B A x: silu is used where it is nearly linear."""
    norms = a.norm(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    # silu(h) is h/2 near zero.
    return b * (2 / _LINEAR_RANGE * norms.T), a * (_LINEAR_RANGE / norms)
