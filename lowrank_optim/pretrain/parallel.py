"""How a model is spread over the processes that train it together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.groups import long_side
from lowrank_optim.optim.weight_storage import is_quantized
from lowrank_optim.pretrain.config import QUANTIZED, Resolved

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

# What acts on whole weights, or on pairs of factors.
NEEDS_WHOLE = ("refactorize", "merge", "dropout")
# Of torch.optim, those whose state is of the parameter's shape.
ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax)


def check_sharding(run: Resolved) -> None:
    """Raise ValueError where ``--fsdp`` cannot do what a run asks for."""
    if torch.__version__ < "2.11":
        raise ValueError(f"Invalid fsdp: True with torch {torch.__version__}, whose checkpoints cannot: expected 2.11")
    if run.weights in QUANTIZED:
        raise ValueError(f"Invalid weights: {run.weights!r} with fsdp, expected 'bf16' or a run without --fsdp")
    if run.restarts in NEEDS_WHOLE:
        raise ValueError(
            f"Invalid restarts: {run.restarts!r} with fsdp, which splits the factors; expected 'reset', 'none' or a "
            "run without --fsdp"
        )
    if run.compile:
        raise ValueError("Invalid compile: True with fsdp, expected a run without --compile or without --fsdp")


def check_sharded(optimizer: Optimizer) -> None:
    """Raise ValueError where an optimizer cannot step sharded parameters, or not with its options."""
    if isinstance(optimizer, LowRankOptimizer):
        # Asks for the layout of each.
        optimizer.explain()
    elif type(optimizer) not in ELEMENTWISE:
        kinds = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise ValueError(
            f"Invalid optimizer: {type(optimizer).__name__} with fsdp, expected one of lowrank_optim or {kinds}"
        )


def share_weights_(model: nn.Module) -> None:
    """Give all processes the weights and buffers of the first, whatever their devices have drawn."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not is_quantized(tensor) and tensor.numel():
            values = tensor.detach().contiguous()
            # As bytes: not every backend moves every dtype.
            dist.broadcast(values.view(-1).view(torch.uint8), 0)
            tensor.detach().copy_(values)


def shard_(network: nn.Module, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the parameters of a model over all processes, its layers one by one.

    Args:
        network: what is called to compute a loss; it holds ``model``.
        model: what transformers says of it tells its layers.
        mesh: of the processes.

    Raises:
        ValueError: a parameter that is a scalar.
    """
    from torch.distributed.fsdp import fully_shard

    for name, param in model.named_parameters():
        if param.ndim == 0:
            raise ValueError(f"Invalid model: {name} is a scalar, which cannot be split; train it without --fsdp")
    layers = set(model._no_split_modules or ())
    # What a layer holds before the layer.
    for module in reversed(list(model.modules())):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, shard_placement_fn=long_side)
    fully_shard(network, mesh=mesh, shard_placement_fn=long_side)


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    """One copy a process, whose gradients become their mean."""
    with warnings.catch_warnings():
        # torch 2.13 has another name for broadcast_buffers.
        warnings.simplefilter("ignore", FutureWarning)
        # Weights are the same already, and those in int8 cannot be sent. Buffers are constants, the indices of sparse
        # layers among them: nothing to send before every forward pass. Gradients are views of what is sent, not copies
        # beside it: half the memory.
        return DistributedDataParallel(
            network,
            device_ids=None if device.type == "cpu" else [device],
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
