"""What every weight parameterization shares: the options, and a module behind ``nn.Linear``'s interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.optim.validation import check_positive_int


class Parameterization(ABC):
    """The options of one parameterization; subclasses are frozen dataclasses that check them on construction."""

    @property
    @abstractmethod
    def layer(self) -> Callable[..., FactoredLinear]:
        """The class of its layers."""

    def build(
        self, in_features: int, out_features: int, *, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> FactoredLinear:  # fmt: skip
        """An initialised layer; on the meta device only its shapes.

        Args:
            in_features: n.
            out_features: m.
            bias: whether the layer has a bias (m,).
            device, dtype: of parameters; None takes torch's defaults.
            generator: on the CPU; None takes torch's default one.

        Raises:
            ValueError: options that do not fit the shape.
        """
        return self.layer(in_features, out_features, self, bias=bias, device=device, dtype=dtype, generator=generator)


class FactoredLinear(nn.Module):
    """A linear layer y = x Wᵀ + b whose weight W (m, n) is held in parts.

    Subclasses create their parameters with ``torch.empty`` and fill them in :meth:`reset_parameters`, so that
    a layer can be made on the meta device. What is not trained is a persistent buffer or a parameter without
    gradient: the state dict is the whole layer.

    Attributes:
        nonlinear: whether the layer has an activation between its parts, so that no W exists.
    """

    nonlinear: bool = False

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive_int("in_features", in_features)
        check_positive_int("out_features", out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) from x (..., n)."""
        raise NotImplementedError

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W (m, n), computed in fp32 or wider and rounded once to the dtype of the parameters.

        Raises:
            RuntimeError: a nonlinear layer.
        """
        if self.nonlinear:
            raise self.no_dense_weight()
        return self.composed()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything anew, in place; the same values on every device, for all draws are the CPU's."""
        self.draw_(generator)
        self.reset_bias_(generator)

    @torch.no_grad()
    def from_weight_(self, weight: Tensor) -> None:
        """Take over a trained dense weight (m, n), as closely as the parts can express it, in place.

        Raises:
            ValueError: a weight of another shape.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"Invalid weight: shape {tuple(weight.shape)}, expected ({self.out_features}, {self.in_features})"
            )
        self.fit_(weight)

    def composed(self) -> Tensor:
        """What :meth:`dense_weight` returns."""
        raise NotImplementedError

    def draw_(self, generator: torch.Generator | None) -> None:
        """The part of :meth:`reset_parameters` that is not the bias."""
        raise NotImplementedError

    def fit_(self, weight: Tensor) -> None:
        """What :meth:`from_weight_` does with a weight of the right shape."""
        raise NotImplementedError

    def reset_bias_(self, generator: torch.Generator | None = None) -> None:
        """Draw the bias as ``nn.Linear`` does."""
        if self.bias is not None:
            uniform_(self.bias, self.in_features**-0.5, generator)

    def no_dense_weight(self) -> RuntimeError:
        """The error that :meth:`dense_weight` of a nonlinear layer raises."""
        return RuntimeError(
            f"{type(self).__name__} has an activation between its factors, so no dense weight equals it: "
            "keep the converted model, or train with act='none'"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ParameterizedLinear(FactoredLinear):
    """A layer that its options describe."""

    def __init__(
        self, in_features: int, out_features: int, options: Any, *, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.options = options
        self.make_parts_(device, dtype)
        self.reset_parameters(generator)

    def make_parts_(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Create what the layer holds beside its bias, without values."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.options}"


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raise ValueError where a layer is too small for ``rank``."""
    if rank > min(in_features, out_features):
        raise ValueError(
            f"Invalid rank: {rank}, expected at most {min(in_features, out_features)}, "
            f"the smaller side of a {out_features} x {in_features} weight"
        )


def empty_factors(
    layer: FactoredLinear, rank: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, n) and B (m, rank) of a layer, without values; ValueError where it is too small for the rank."""
    check_rank(rank, layer.in_features, layer.out_features)
    shapes = (rank, layer.in_features), (layer.out_features, rank)
    a, b = (nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes)
    return a, b


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to decompose and multiply in: fp32, or fp64 for fp64 weights."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def uniform_(target: Tensor, bound: float, generator: torch.Generator | None = None) -> None:
    """Fill ``target`` from U(-bound, bound), drawn on the CPU in fp32 or wider; nothing happens on meta."""
    _fill_(target, generator, lambda draw, g: draw.uniform_(-bound, bound, generator=g))


@torch.no_grad()
def normal_(target: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fill ``target`` from N(0, std²), drawn on the CPU in fp32 or wider; nothing happens on meta."""
    _fill_(target, generator, lambda draw, g: draw.normal_(0.0, std, generator=g))


def _fill_(target: Tensor, generator: torch.Generator | None, draw: Any) -> None:
    if not target.is_meta:
        # One stream of numbers for every device and dtype: a model converted on a GPU starts as on the CPU.
        values = torch.empty(target.shape, dtype=working_dtype(target.dtype), device="cpu")
        target.copy_(draw(values, generator))
