"""Linear layers with int8 or int4 weights, trained without a floating-point copy of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lowrank_optim.nn.base import FactoredLinear, uniform_, working_dtype
from lowrank_optim.nn.convert import check_shared, select_linears, sharing_key
from lowrank_optim.ops.autocast import compute_dtype
from lowrank_optim.ops.quantized_weight import FORMATS, INT4, INT8, Format
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.validation import check_choice
from lowrank_optim.optim.weight_storage import QuantizedReference, is_quantized


def quantized_linear_input_gradient(g: Tensor, codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """g W, (T, n), in the dtype of g (T, m); ``columns`` is n."""
    return g @ FORMATS[codes.dtype].dequantize(codes, scale, columns, g.dtype)


# Opaque to the compiler, which would otherwise keep the W of the forward pass for the backward pass.
_compiled_input_gradient = torch.library.custom_op(
    "lowrank_optim::quantized_linear_input_gradient", quantized_linear_input_gradient, mutates_args=(),
    schema="(Tensor g, Tensor codes, Tensor scale, SymInt columns) -> Tensor",
)  # fmt: skip


@_compiled_input_gradient.register_fake
def _(g: Tensor, codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    return g.new_empty(g.shape[0], columns)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scale)
        W = FORMATS[codes.dtype].dequantize(codes, scale, weight.shape[1], compute_dtype(weight))
        return functional.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, codes, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        columns = x.shape[-1]
        g = grads[0].reshape(-1, codes.shape[0])
        dx = dW = None
        if needs_x:
            compiling = torch.compiler.is_compiling()
            input_gradient = _compiled_input_gradient if compiling else quantized_linear_input_gradient
            dx = input_gradient(g, codes, scale, columns).view(x.shape)
        if needs_weight:
            dW = g.t() @ x.reshape(-1, columns).to(g.dtype)
        return dx, dW, g.sum(0) if needs_bias else None, None, None


class QuantizedLinear(FactoredLinear):
    """y = x Wᵀ + b with W stored as codes and a scale for every group of neighbours in a row.

    W is dequantized in the forward pass and again in the backward pass; no floating-point copy outlives either.
    Gradients arrive at ``weight``, a parameter that optimizers, hooks and parameter groups see as any other: it has
    W's shape, and the dtype of the arithmetic, but the memory of one element, which is NaN. The values are in the
    buffers, and every optimizer of this package writes them in fp32 with stochastic rounding. That is the same on all
    ranks of ``DistributedDataParallel(..., init_sync=False, broadcast_buffers=False)``; with ``init_sync`` it would
    write into the parameter, which torch refuses.

    Args:
        in_features: n.
        out_features: m.
        bias: whether there is a bias (m,).
        device: of everything.
        dtype: of the arithmetic, the gradients and the bias; the scales are fp32 whatever it is.
        weight: the initial values (m, n); None draws them as ``nn.Linear`` does.

    Attributes:
        format: how W is stored.
        weight: the parameter (m, n) that stands for W; not in the state dict.
        weight_codes, weight_scale: buffers of the format's shapes.
    """

    format: ClassVar[Format]
    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(1, 1, device=device, dtype=dtype).expand(shape))
        codes = torch.empty(self.format.codes_shape(*shape), device=device, dtype=self.format.dtype)
        self.register_buffer("weight_codes", codes)
        scale = torch.empty(self.format.scale_shape(*shape), device=device, dtype=torch.float32)
        self.register_buffer("weight_scale", scale)
        self._bind()
        if weight is None:
            self.reset_parameters()
        else:
            self.from_weight_(weight)
            self.reset_bias_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _QuantizedLinear.apply(x, self.weight, self.bias, self.weight_codes, self.weight_scale)  # type: ignore[no-untyped-call]
        return y

    def composed(self) -> Tensor:
        return self.format.dequantize(self.weight_codes, self.weight_scale, self.in_features, self.weight.dtype)

    def draw_(self, generator: torch.Generator | None) -> None:
        W = torch.empty(self.weight.shape, dtype=working_dtype(self.weight.dtype), device=self.weight.device)
        uniform_(W, self.in_features**-0.5, generator)
        self.from_weight_(W)

    def fit_(self, weight: Tensor) -> None:
        """Each value to the nearest code."""
        # Without data only the shapes count.
        if not weight.is_meta:
            self.format.quantize_(self.weight_codes, self.weight_scale, weight)

    def _bind(self) -> None:
        """Tie the parameter to this module: one element, on the device where the buffers are."""
        _guard_against_other_optimizers()
        weight: Any = self.weight
        # Whoever takes the parameter for the values is to notice.
        one = torch.full((1, 1), torch.nan, device=self.weight_codes.device, dtype=weight.dtype).expand(weight.shape)
        if weight.device == one.device:
            # The same object, for an optimizer may hold it.
            weight.data = one
        else:
            weight = self.weight = nn.Parameter(one, weight.requires_grad)
        weight.quantized_reference = QuantizedReference(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def keep_format(tensor: Tensor) -> Tensor:
            if tensor is self.weight:
                return fn(tensor.as_strided((1, 1), (1, 1))).expand(tensor.shape)
            moved = fn(tensor)
            # .bfloat16() must not take the scales along.
            return moved if tensor is not self.weight_scale or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_format, recurse)  # type: ignore[no-untyped-call]
        self._bind()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        weight = self.weight
        # A parameter that is None is neither missed nor loaded.
        self._parameters["weight"] = None
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._parameters["weight"] = weight
        self._bind()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        # Before the parameter's own way of copying makes a full tensor of it, which _bind could only shrink.
        memo.setdefault(id(self.weight), nn.Parameter(self.weight.detach(), self.weight.requires_grad))
        clone.__setstate__(copy.deepcopy(self.__dict__, memo))
        return clone


class Int8Linear(QuantizedLinear):
    """:class:`QuantizedLinear` with int8 codes (m, n) and a scale for every 256 values."""

    format = INT8


class Int4Linear(QuantizedLinear):
    """:class:`QuantizedLinear` with two codes a byte, uint8 (m, ceil(n / 2)), and a scale for every 128 values.

    The rounding of updates is what it costs: see :mod:`lowrank_optim.ops.int4_weight`.
    """

    format = INT4


LAYERS: dict[int, type[QuantizedLinear]] = {8: Int8Linear, 4: Int4Linear}


def quantize_weights(model: nn.Module, targets: str | Iterable[str] | None = None, *, bits: int = 8) -> list[str]:
    """Replace the matching ``nn.Linear`` modules of ``model`` by quantized ones with the nearest codes, in place.

    It replaces one layer at a time, so that only one weight exists beside the model. Works on the meta device and under
    ``FakeTensorMode``. :func:`lowrank_optim.nn.merge` goes back; :func:`lowrank_optim.nn.merged_state_dict` gives the
    floating-point weights for an export.

    Args:
        model: any module; its optimizer is made afterwards, from this package: others raise in ``step``.
        targets: as for :func:`lowrank_optim.nn.convert`.
        bits: 8 for :class:`Int8Linear`, 4 for :class:`Int4Linear`.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: other bits, a target that matches nothing, a layer that is converted already, or a weight shared
            with a module that stays.
    """
    check_choice("bits", bits, tuple(LAYERS))
    chosen = select_linears(model, targets)
    check_shared(model, chosen)
    made: dict[tuple[int, int], QuantizedLinear] = {}
    keys = {name: sharing_key(linear) for name, linear in chosen.items()}
    for name, key in keys.items():
        linear = chosen.pop(name)
        if key not in made:
            made[key] = _quantized(linear, LAYERS[bits])
        model.set_submodule(name, made[key])
    return list(keys)


def _quantized(linear: nn.Linear, kind: type[QuantizedLinear]) -> QuantizedLinear:
    weight = linear.weight
    layer = kind(
        linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype, weight=weight
    )  # fmt: skip
    layer.weight.requires_grad_(weight.requires_grad)
    layer.bias = linear.bias
    return layer.train(linear.training)


@functools.cache
def _guard_against_other_optimizers() -> None:
    """An expanded parameter makes torch's own optimizers fail in words that nobody understands; bitsandbytes writes
    through raw pointers, beyond the end of the one element."""

    def refuse(optimizer: Optimizer, *_: Any) -> None:
        if isinstance(optimizer, LowRankOptimizer):
            return
        if any(is_quantized(p) for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} cannot write quantized weights: use an optimizer of lowrank_optim for the "
                "parameters of Int8Linear and Int4Linear, or merge(model) for floating-point weights"
            )

    register_optimizer_step_pre_hook(refuse)
