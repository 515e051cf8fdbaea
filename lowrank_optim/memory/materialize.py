"""Stand-ins for the weights and the text of a run: random ones, or tensors of undefined values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.nn import QuantizedLinear
from lowrank_optim.pretrain.batches import Batch
from lowrank_optim.pretrain.build import build_network
from lowrank_optim.pretrain.config import Resolved


def materialize(run: Resolved, config: Any, device: str) -> Any:
    """The model with random weights, made tensor by tensor, so that no second one is ever in memory."""
    if run.parameterization is not None:
        return build_network(run, config, device)
    model: Any = build_network(run, config, "meta")
    allocate_(model, device)
    randomize_(model)
    # Buffers that are not saved are no weights: modules compute them from the configuration.
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            model.set_submodule(name, type(module)(config=model.config).to(device))
    return model


def allocate_(model: nn.Module, device: str) -> None:
    """Give a model on the meta device tensors on another one, of undefined values; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    # The parameter of a quantized weight has strides of zero: it has one element.
                    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                    made[tensor] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    made[tensor].__dict__.update(tensor.__dict__)
                tensors[name] = made[tensor]  # type: ignore[assignment]


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Fresh weights, one matrix at a time: N(0, 0.02²) for matrices, ones for vectors."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.from_weight_(
                torch.empty_like(module.weight, memory_format=torch.contiguous_format).normal_(std=0.02)
            )
            continue
        for p in module.parameters(recurse=False):
            p.fill_(1) if p.ndim < 2 else p.normal_(std=0.02)


def random_batches(run: Resolved, vocabulary: int, device: torch.device | str) -> list[Batch]:
    """The micro-batches of one update, of random tokens."""
    tokens = torch.randint(vocabulary, (run.accumulate, run.batch_size, run.seq_len)).to(device)
    return [Batch(ids, ids) for ids in tokens]
