"""Maestro: factors of full width, ordered by dropout, whose ranks shrink while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer

from lowrank_optim.nn.base import Parameterization, ParameterizedLinear, empty_factors, normal_
from lowrank_optim.nn.convert import factored_layers, layer_generator
from lowrank_optim.nn.lowrank import balanced_factors, scaled_product
from lowrank_optim.nn.restarts import Restart
from lowrank_optim.optim.validation import check_positive_int, check_range


class MaestroLinear(ParameterizedLinear):
    """The layer of :class:`Maestro`: parameters ``A`` (r, n), ``B`` (m, r), ``bias`` (m,).

    Buffer ``kept``, int32 (): how many components are left of the r. Those that were cut off take no part in a product,
    and are zero.

    Attributes:
        rank: the value of ``kept``, on the host.
        width: b of the coming update, at most ``rank``.
    """

    kept: Tensor

    options: Maestro

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        rank = min(self.in_features, self.out_features) if self.options.rank is None else self.options.rank
        self.rank = self.width = rank
        self.A, self.B = empty_factors(self, rank, device, dtype)
        self.register_buffer("kept", torch.tensor(rank, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        width = self.width if self.training else self.rank
        return linear(linear(x, self.A[:width]), self.B[:, :width], self.bias)

    def composed(self) -> Tensor:
        return scaled_product(self.B[:, : self.rank], self.A[: self.rank], 1.0).to(self.A.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        self._keep(len(self.A))
        # An entry of B A sums r products.
        std = (self.options.std / self.rank**0.5) ** 0.5
        normal_(self.A, std, generator)
        normal_(self.B, std, generator)

    def fit_(self, weight: Tensor) -> None:
        """The best approximation of the rank, its singular values split evenly and in descending order."""
        self._keep(len(self.A))
        b, a = balanced_factors(weight, self.rank)
        self.B.copy_(b)
        self.A.copy_(a)

    @torch.no_grad()
    def shrink_(self, rank: int) -> None:
        """Keep the first ``rank`` components."""
        self.A[rank:] = 0
        self.B[:, rank:] = 0
        self._keep(rank)

    def _keep(self, rank: int) -> None:
        self.rank = self.width = rank
        self.kept.fill_(rank)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.kept.is_meta:
            self.rank = self.width = int(self.kept)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


@dataclass(frozen=True)
class Maestro(Parameterization):
    """y = B[:, :b] (A[:b] x) + b with a width b that :class:`OrderedDropout` draws (arXiv 2308.14929).

    Without the callback, and in evaluation, b is the whole rank: plain factors. With it the k-th components of A and B
    learn what the first k - 1 leave over, as in an SVD, and those for which nothing is left disappear.

    Args:
        rank: r at the start, columns of B (m, r) and rows of A (r, n); None for the smaller side of the layer.
        std: deviation of the entries of B A at the start; both factors are Gaussian.

    Raises:
        ValueError: an option out of range; on building, a rank above the smaller side of the layer.
    """

    layer = MaestroLinear
    rank: int | None = None
    std: float = 0.02

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank, optional=True)
        check_range("std", self.std, low=0.0)


class OrderedDropout(Restart):
    """Draws the width of one layer for every update, pushes tails of factors to zero and cuts off what is zero.

    Of all pairs of a layer and one of its widths, one is drawn with equal probability; the other layers have their
    whole rank. After every update the hierarchical group lasso of each layer takes its proximal step::

        penalty = lasso Σ_k (|A[k:]| + |B[:, k:]|)          # Frobenius norms of the tails

    and every ``every`` updates the ranks become the least k with |A[k:]| |B[:, k:]| < threshold, at least 1. What is
    cut off is not multiplied with any more; its memory, and that of its moments, is free once the model is merged
    (:func:`lowrank_optim.nn.merge`) and compressed (:func:`lowrank_optim.nn.compress`).

    Args:
        model: a model converted with :class:`Maestro`.
        optimizer: of its parameters; its learning rate is the size of the proximal step.
        every: updates from one cut to the next (published: an epoch).
        first: no cut before this many updates.
        lasso: weight of the penalty (published: 1e-6 to 5e-3).
        threshold: see above (published: 1e-5).
        seed: of the widths, which are a function of it and of the number of updates.

    Raises:
        ValueError: an option out of range, or a model without Maestro layers.

    Source: Horváth et al. 2023 (arXiv 2308.14929). For whitened inputs and a linear target, dropout alone makes B A cut
    at k the best approximation of rank k, for every k.

    Deviations: pairs are drawn with replacement, not from a shuffled list; there is no second pass at full width. The
    penalty acts by its proximal operator, decoupled from the gradient, where the published code adds it to the loss,
    whose gradient is NaN at tails of zero; these become exactly zero. Layers do not go back to dense ones.
    """

    optimizer: Optimizer

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, every: int = 1000, first: int = 0, lasso: float = 1e-6,
        threshold: float = 1e-5, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, every=every, first=first, ramp=0)
        check_range("lasso", lasso, low=0.0)
        check_range("threshold", threshold, low=0.0)
        self.layers = [layer for layer in factored_layers(model).values() if isinstance(layer, MaestroLinear)]
        if not self.layers:
            raise ValueError(f"Invalid model: {type(model).__name__} holds no MaestroLinear to draw widths for")
        self.lasso, self.threshold, self.seed = lasso, threshold, seed

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        if self.lasso > 0:
            rates = {p: float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
            for layer in self.layers:
                shrink_tails_(layer.A[: layer.rank], self.lasso * rates.get(layer.A, 0.0))
                shrink_tails_(layer.B[:, : layer.rank].mT, self.lasso * rates.get(layer.B, 0.0))
        cut = super().after_step(step)
        self._draw()
        return cut

    def restart_(self) -> None:
        for layer in self.layers:
            left = tail_norms(layer.A[: layer.rank]) * tail_norms(layer.B[:, : layer.rank].mT)
            layer.shrink_(max(1, int((left >= self.threshold).sum())))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._draw()

    def _draw(self) -> None:
        """Set the widths of the update after ``step``."""
        for layer in self.layers:
            layer.width = layer.rank
        generator = layer_generator(self.seed, 0, self.step)
        pair = int(torch.randint(sum(layer.rank for layer in self.layers), (), generator=generator, device="cpu"))
        for layer in self.layers:
            if pair < layer.rank:
                layer.width = pair + 1
                return
            pair -= layer.rank


def tail_norms(rows: Tensor) -> Tensor:
    """The Frobenius norm of rows k, k + 1, ... for every k, (r,), in fp32 or wider."""
    squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1)
    return squares.flip(0).cumsum(0).flip(0).sqrt()


def shrink_tails_(rows: Tensor, size: float) -> None:
    """The proximal operator of ``size`` times the sum of all :func:`tail_norms`, in place.

    The groups are nested, so that soft thresholds from the smallest group outwards are exact (Jenatton et al. 2011,
    arXiv 1009.2139).
    """
    factors: list[float] = []
    tail = 0.0
    for square in reversed(rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1).tolist()):
        norm = math.sqrt(square + tail**2)
        factors.append(max(1 - size / norm, 0.0) if norm > 0 else 0.0)
        tail = norm * factors[-1]
    # Row j is in the groups 0, ..., j.
    kept = torch.tensor(factors[::-1], dtype=torch.float64, device="cpu").cumprod(0)
    rows.mul_(kept.to(rows).unsqueeze(1))
