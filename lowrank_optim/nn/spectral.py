"""SST: a weight as its singular value decomposition, of which a sample of the vectors trains at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_optim.nn.base import Parameterization, ParameterizedLinear, check_rank, normal_, working_dtype
from lowrank_optim.ops.spectral_linear import spectral_linear
from lowrank_optim.ops.triplets import Triplets, activate_, compose, decompose_, draw_slots
from lowrank_optim.optim.validation import check_positive_int, check_range


class SSTLinear(ParameterizedLinear):
    """The layer of :class:`SST`.

    Column i of [u u_frozen], entry i of s and column i of [v v_frozen] are one triplet; drawing another sample swaps
    triplets between the two parts, so no index is kept. Parameters: ``u`` (m, r), ``s`` (q,), ``v`` (n, r), ``bias``
    (m,), and without gradient ``u_frozen`` (m, q - r), ``v_frozen`` (n, q - r), with q = min(m, n).
    """

    options: SST

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        check_rank(self.options.rank, self.in_features, self.out_features)
        m, n, r, q = self.out_features, self.in_features, self.options.rank, min(self.in_features, self.out_features)

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=trained)

        self.u, self.s, self.v = parameter(m, r), parameter(q), parameter(n, r)
        self.u_frozen = parameter(m, q - r, trained=False)
        self.v_frozen = parameter(n, q - r, trained=False)

    @property
    def parts(self) -> Triplets:
        """The parameters as the operations of :mod:`lowrank_optim.ops.triplets` take them."""
        return Triplets(self.u, self.s, self.v, self.u_frozen, self.v_frozen)

    def forward(self, x: Tensor) -> Tensor:
        y = spectral_linear(x, *self.parts, enhanced=self.options.enhanced)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def composed(self) -> Tensor:
        return compose(self.parts).to(self.u.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        """The decomposition of a Gaussian weight, and a sample of it to train."""
        if not self.u.is_meta:
            dtype = working_dtype(self.u.dtype)
            dense = torch.empty(self.out_features, self.in_features, device=self.u.device, dtype=dtype)
            normal_(dense, self.options.std, generator)
            self._take_(dense, generator)

    def fit_(self, weight: Tensor) -> None:
        """Exact but for rounding; which triplets train at first is drawn with a fixed seed.

        Raises:
            ValueError: a weight of another shape, or without a singular value decomposition.
        """
        self._take_(weight, torch.Generator().manual_seed(0))

    def _take_(self, weight: Tensor, generator: torch.Generator | None) -> None:
        slots = draw_slots(self.s, self.options.rank, generator) if decompose_(self.parts, weight) else None
        if slots is None:
            raise ValueError("Invalid weight: it has no singular value decomposition, expected finite values")
        activate_(self.parts, slots)


@dataclass(frozen=True)
class SST(Parameterization):
    """W = U diag(S) Vᵀ; every singular value trains, and ``rank`` pairs of singular vectors at a time.

    Sparse spectral training (Zhao et al. 2024, arXiv 2405.15481). :class:`lowrank_optim.SSTAdamW` keeps the vectors at
    unit length, draws which of them train and decomposes W anew every round; with any other optimizer the pairs drawn
    at the start train for good. The parts take more memory than W (q (m + n + 1) values with q = min(m, n));
    gradients and optimizer states are those of rank (m + n) + q values.

    Args:
        rank: r, pairs of singular vectors that train at a time.
        enhanced: train the vectors on the gradient without the factor S, so that those of small singular values
            learn as well; else on the true gradient.
        std: deviation of the initial dense weight.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.
    """

    layer = SSTLinear
    rank: int = 128
    enhanced: bool = True
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_range("std", self.std, low=0.0)
