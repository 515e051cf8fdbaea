"""Layers between hyperboloids, whose weight may be any parameterization of this package.

A point of the hyperboloid has a time and further space coordinates, x = [t; p] with t = sqrt(1 + |p|²).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowrank_optim.nn.base import Parameterization, uniform_
from lowrank_optim.optim.validation import check_range


class LorentzLinear(nn.Module):
    """HyboNet's linear layer, a map from one hyperboloid to another of curvature -1.

        z = W x + b,   t = exp(log_scale) sigmoid(z_0) + floor,   y = [t; sqrt(t² - 1) z_1.. / |z_1..|]

    W mixes time with space, so that boosts are among its maps, and t bounds the distance from the origin.

    Args:
        in_features: coordinates of x, time included, at least 2.
        out_features: coordinates of y, time included, at least 2.
        bias: whether there is a b.
        weight: how W is held, for example ``SST(rank=8)``; None is a dense ``nn.Linear``.
        scale: initial range of the time coordinate, > 0.
        floor: lowest time coordinate, > 1.
        device, dtype: of the parameters.
        generator: on the CPU; None takes torch's default one.

    Raises:
        ValueError: an argument out of range.

    Source: Chen et al. 2022, Fully Hyperbolic Neural Networks (arXiv 2105.14686), equation 3 without its activation
    and dropout, which act on x.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, weight: Parameterization | None = None,
        scale: float = 10.0, floor: float = 1.1, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 2:
                raise ValueError(f"Invalid {name}: {size!r}, expected an int of at least 2, for time and space")
        for name, value, low in (("scale", scale, 0.0), ("floor", floor, 1.0)):
            check_range(name, value, low=low)
            if value == low:
                raise ValueError(f"Invalid {name}: {value}, expected a number above {low:g}")
        self.floor = floor
        self.log_scale = nn.Parameter(torch.full((), math.log(scale), device=device, dtype=dtype))
        self.linear: nn.Module
        if weight is None:
            self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
            for p in self.linear.parameters():
                uniform_(p, in_features**-0.5, generator)
        else:
            self.linear = weight.build(
                in_features, out_features, bias=bias, device=device, dtype=dtype, generator=generator
            )

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) on the hyperboloid from x (..., in_features)."""
        z = self.linear(x)
        time = self.log_scale.exp() * z[..., :1].sigmoid() + self.floor
        space = z[..., 1:]
        # A zero vector has no direction; its gradient must stay finite.
        length = space.square().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(space.dtype).tiny).sqrt()
        return torch.cat([time, space * ((time.square() - 1).sqrt() / length)], dim=-1)

    def extra_repr(self) -> str:
        return f"floor={self.floor:g}"


def on_hyperboloid(space: Tensor) -> Tensor:
    """The point (..., d + 1) with the given space coordinates (..., d)."""
    return torch.cat([(1 + space.square().sum(dim=-1, keepdim=True)).sqrt(), space], dim=-1)


def lorentz_inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> = -x_0 y_0 + x_1 y_1 + ..., over the last axis."""
    return (x[..., 1:] * y[..., 1:]).sum(dim=-1) - x[..., 0] * y[..., 0]


def squared_lorentz_distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|² = -2 - 2 <x, y> >= 0 of two points on the hyperboloid; 2 cosh(d) - 2 of their geodesic distance d."""
    return -2 - 2 * lorentz_inner(x, y)
