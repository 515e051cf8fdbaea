"""Bytes of weights, gradients and optimizer state: predicted on the meta device, or of real tensors.

Both answers come from the same counting function, and the predicted state is allocated by the optimizer's own
initialisation, so there is no formula that could drift from the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.llama import build_config, build_model
from lowrank_optim.pretrain.optimizers import build_optimizer
from lowrank_optim.pretrain.parameterizations import parameterize_, plan_parameterization, published

if TYPE_CHECKING:
    from transformers import LlamaConfig

WEIGHTS = ("bf16", "int8")
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "other")


class TensorBytes(TypedDict):
    weights: int
    gradients: int
    optimizer: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """What one training job keeps in memory between two steps, in bytes.

    Attributes:
        model: preset name or path.
        optimizer: class name.
        optimizer_args: its arguments.
        dtype: of weights and gradients.
        parameters: number of trainable elements.
        low_rank_parameters: how many of them the optimizer compresses.
        parameterization: of the attention and MLP matrices, None for dense ones.
        parameterization_args: its options.
        index_bytes: how many bytes of the weights are integers: where sparse values stand.
        by_category: bytes under each of ``CATEGORIES``; a category in ``not_included`` is 0.
        optimizer_by_key: the optimizer's bytes by state key, ``exp_avg``, ``basis``, ...
        not_included: categories that an estimate knows nothing about.
    """

    model: str
    optimizer: str
    optimizer_args: Mapping[str, Any]
    dtype: str
    parameters: int
    low_rank_parameters: int
    by_category: Mapping[str, int]
    optimizer_by_key: Mapping[str, int]
    not_included: tuple[str, ...] = field(default=("activations", "other"))
    parameterization: str | None = None
    parameterization_args: Mapping[str, Any] = field(default_factory=dict)
    index_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of the categories that are included."""
        return sum(self.by_category.values())

    def as_dict(self) -> dict[str, Any]:
        """Every field and ``total_bytes``, ready for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(
    model: str | LlamaConfig,
    optimizer: str,
    optimizer_args: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    parameterization: str | None = None,
    parameterization_args: Mapping[str, Any] | None = None,
    *,
    weights: str = "bf16",
    per_layer: bool = False,
) -> Estimate:
    """Exact bytes of weights, gradients and optimizer state, without allocating any of them.

    Args:
        model: a preset, a ``config.json`` or its folder, or a configuration.
        optimizer: a name that :func:`lowrank_optim.pretrain.optimizers.build_optimizer` takes.
        optimizer_args: constructor arguments.
        dtype: of weights and gradients.
        parameterization: "sltrain", "lowrank", ..., None for dense matrices.
        parameterization_args: its options; what is not given takes the value published for the model's size.
        weights: "int8" for attention and MLP matrices in 8 bits, "bf16" for all of them in ``dtype``.
        per_layer: updates in backward, where the largest gradient is the only one.

    Raises:
        ValueError: unknown model, optimizer, parameterization or argument, or a value out of range.
        RuntimeError: a package that the model or the optimizer needs is not installed.
    """
    network, layers = build_network(model, "meta", dtype, parameterization, parameterization_args, weights)
    built = build_optimizer(optimizer, network, args=optimizer_args)
    for p in network.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    init_state_(built)
    sizes = tensor_bytes(network, built)
    by_category = dict.fromkeys(CATEGORIES, 0)
    by_category["weights"] = sizes["weights"]
    by_category["gradients"] = sizes["gradients"]
    if per_layer:
        by_category["gradients"] = max(_storage_bytes([p.grad], set()) for p in network.parameters())
    by_category["optimizer"] = sum(sizes["optimizer"].values())
    return Estimate(
        model=model if isinstance(model, str) else network.config.model_type,
        optimizer=optimizer,
        optimizer_args=dict(optimizer_args or {}),
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        low_rank_parameters=_low_rank_parameters(built),
        by_category=by_category,
        optimizer_by_key=sizes["optimizer"],
        parameterization=parameterization,
        parameterization_args=layers,
        index_bytes=_storage_bytes((t for t in network.state_dict().values() if not t.is_floating_point()), set()),
    )


def build_network(
    model: str | LlamaConfig,
    device: str,
    dtype: torch.dtype,
    parameterization: str | None = None,
    parameterization_args: Mapping[str, Any] | None = None,
    weights: str = "bf16",
) -> tuple[Any, dict[str, Any]]:
    """The model of :func:`estimate`, and the options of its parameterization."""
    if weights not in WEIGHTS:
        raise ValueError(f"Invalid weights: {weights!r}, expected one of {', '.join(WEIGHTS)}")
    config = build_config(model) if isinstance(model, str) else model
    network = build_model(config, device=device, dtype=dtype)
    layers: dict[str, Any] = {}
    if parameterization is not None:
        if weights == "int8":
            raise ValueError(f"Invalid weights: 'int8', expected 'bf16' with the parameterization {parameterization}")
        size = model if isinstance(model, str) else ""
        layers = {**published(parameterization, size, config.hidden_size).args, **(parameterization_args or {})}
        parameterize_(network, plan_parameterization(parameterization, layers))
    if weights == "int8":
        from lowrank_optim.nn import quantize_weights

        quantize_weights(network)
    return network, layers


def tensor_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> TensorBytes:
    """Bytes of the tensors that a model and its optimizer hold now.

    A storage counts once and whole: tied weights and shared tables are not counted twice, and a view counts
    for everything that it keeps alive.

    Returns:
        ``weights`` (the tensors of the model's state dict), ``gradients``, and ``optimizer`` by state key.
    """
    seen: set[int] = set()
    weights = _storage_bytes(model.state_dict(keep_vars=True).values(), seen)
    gradients = _storage_bytes((p.grad for p in model.parameters()), seen)
    by_key: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                by_key[key] = by_key.get(key, 0) + _storage_bytes([value], seen)
    return {"weights": weights, "gradients": gradients, "optimizer": by_key}


def init_state_(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of every parameter by the optimizer's own code; parameters are on the meta device.

    Optimizers of torch have no separate initialisation: they take a step without data, so each parameter
    needs a gradient.
    """
    if isinstance(optimizer, LowRankOptimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    optimizer.init_state(p, group)
    elif _is_bitsandbytes(optimizer):
        _init_bitsandbytes_(optimizer)
    else:
        for group in optimizer.param_groups:
            # Ways to compute, which check the device; the state is as large without them.
            group.update(dict.fromkeys({"foreach", "fused", "capturable"} & group.keys(), False))
        with _ScalarsAreOne():  # type: ignore[no-untyped-call]
            optimizer.step()


class _ScalarsAreOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets ``item()`` of a meta tensor return 1, for optimizers that read a norm or a step on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))


def _is_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    if not type(optimizer).__module__.startswith("bitsandbytes."):
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return isinstance(optimizer, Optimizer8bit)


def _init_bitsandbytes_(optimizer: Any) -> None:
    # Paged memory needs CUDA and is as large.
    optimizer.is_paged = False
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            optimizer.init_state(group, p, i, j)


def _low_rank_parameters(optimizer: torch.optim.Optimizer) -> int:
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(math.prod(row.shape) for row in optimizer.explain() if row.method not in ("full-rank", "frozen"))


def _storage_bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        # data_ptr() is 0 for every meta tensor; the address of the storage object tells them apart.
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
