"""SLTrain: low-rank factors plus a sparse matrix on a fixed random support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_optim.nn.base import Parameterization, ParameterizedLinear, empty_factors, uniform_, working_dtype
from lowrank_optim.nn.lowrank import balanced_factors, check_alpha, scale_of
from lowrank_optim.ops.sltrain import sltrain_linear, sltrain_weight
from lowrank_optim.ops.support import draw_positions, empty_support, pack_, positions
from lowrank_optim.optim.validation import check_positive_int


class SLTrainLinear(ParameterizedLinear):
    """The layer of :class:`SLTrain`.

    Parameters ``A`` (r, n), ``B`` (m, r), ``values`` (count,) in the order of their positions, ``bias`` (m,).
    Buffers ``index`` and ``row_pointers``, the support packed as in :mod:`lowrank_optim.ops.support`.
    """

    index: Tensor
    row_pointers: Tensor

    options: SLTrain

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.scale = scale_of(self.options.alpha, self.options.rank)
        count = int(self.options.sparsity * self.out_features * self.in_features)
        self.A, self.B = empty_factors(self, self.options.rank, device, dtype)
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        index, row_pointers = empty_support((self.out_features, self.in_features), count, device)
        self.register_buffer("index", index)
        self.register_buffer("row_pointers", row_pointers)

    def forward(self, x: Tensor) -> Tensor:
        return sltrain_linear(
            x, self.B, self.A, self.values, self.bias, self.index, self.row_pointers, scale=self.scale
        )

    def support(self) -> Tensor:
        """The sorted positions row * n + column of the values, (count,), int32 or int64."""
        shape = (self.out_features, self.in_features)
        return positions(self.index, self.row_pointers, shape, self.values.numel())

    def composed(self) -> Tensor:
        B, A, values = (part.to(working_dtype(part.dtype)) for part in (self.B, self.A, self.values))
        W = sltrain_weight(B, A, values, self.index, self.row_pointers, scale=self.scale)
        return W.to(self.A.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        if not self.index.is_meta:
            shape = (self.out_features, self.in_features)
            flat = draw_positions(shape, self.values.numel(), generator)
            pack_(self.index, self.row_pointers, flat, shape)
        # Not zero as B is: with W = 0 no layer below would get a gradient.
        uniform_(self.values, self.in_features**-0.5, generator)
        uniform_(self.A, self.in_features**-0.5, generator)
        self.B.zero_()

    def fit_(self, weight: Tensor) -> None:
        """The best rank-r approximation, split evenly, and what it misses on the support, which stays."""
        b, a = balanced_factors(weight, self.options.rank)
        missed = weight.to(b.dtype) - b @ a
        self.B.copy_(b / self.scale**0.5)
        self.A.copy_(a / self.scale**0.5)
        self.values.copy_(missed.view(-1)[self.support()])


@dataclass(frozen=True)
class SLTrain(Parameterization):
    """y = (s B A + S) x + b with s = alpha / rank, S sparse on a support that is drawn once (arXiv 2406.02214).

        A ~ U(±1/sqrt(n))   B = 0   values of S ~ U(±1/sqrt(n))   support: uniform, int(sparsity m n) entries

    W exists for one layer at a time, a dense gradient never; see :mod:`lowrank_optim.ops.sltrain`. Training
    multiplies as much as a dense layer and rebuilds W twice: merge a model before generating text with it.

    Args:
        rank: r, columns of B (m, r) and rows of A (r, n).
        sparsity: the share of W's entries that S holds, above 0 and below 1; published: 0.03, at 7B 0.05.
        alpha: numerator of s, which under Adam is a factor on the learning rate of B A; published:
            32, 16, 16, 8, 8 for 60M, 130M, 350M, 1B, 7B. None stands for s = 1.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.

    Deviations: the support of a seed is not that of the published code, which permutes all positions;
    the index takes 2 to 4 bytes an entry or a bit of W, whichever is smallest, instead of 8 bytes.
    """

    layer = SLTrainLinear
    rank: int = 128
    sparsity: float = 0.03
    alpha: float | None = 32

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_sparsity(self.sparsity)
        check_alpha(self.alpha)


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless a share lies strictly between 0 and 1."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ValueError(f"Invalid sparsity: {sparsity!r}, expected a number above 0 and below 1")
