"""From options to model and optimizer, for runs as for what predicts them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lowrank_optim.nn import quantize_weights
from lowrank_optim.nn.restarts import Restart
from lowrank_optim.ops import is_gpu
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.in_backward import StepInBackward, step_in_backward
from lowrank_optim.pretrain.config import QUANTIZED, Options, Resolved
from lowrank_optim.pretrain.llama import (
    build_config,
    build_model,
    checkpoint_activations_,
    load_pretrained,
    plain_head,
    pretrained_config,
)
from lowrank_optim.pretrain.optimizers import build_optimizer, parse_optimizer_args
from lowrank_optim.pretrain.parallel import check_sharded, check_sharding, shard_, share_weights_
from lowrank_optim.pretrain.parameterizations import LayerSpec, build_restarts, layer_spec, parameterize_
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.steps import LossSum

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(
    options: Options, device: torch.device | str, *, processes: int = 1, config: PreTrainedConfig | None = None
) -> tuple[Resolved, PreTrainedConfig, PreTrainedModel, Optimizer]:
    """The run that options describe: :func:`settle`, :func:`build_network` and :func:`optimizer_for`, in this order.

    Raises:
        UserError, ValueError, RuntimeError, ImportError: options that contradict each other or are out of range, or a
            package that they need is not installed.
    """
    run, config = settle(options, processes=processes, config=config)
    model = build_network(run, config, device)
    return run, config, model, optimizer_for(run, model)


def build_parallel(
    options: Options, device: torch.device, *, processes: int
) -> tuple[Resolved, PreTrainedConfig, PreTrainedModel, LossSum, Optimizer]:
    """As :func:`build`, for one of several processes; in front of the optimizer what computes the loss.

    Parameters are the same in all of them, split with ``options.fsdp``, and random numbers differ.
    """
    run, config = settle(options, processes=processes)
    model = build_network(run, config, device)
    network = LossSum(model, chunked=run.chunked_loss)
    if processes > 1:
        share_weights_(model)
        if run.fsdp:
            from torch.distributed.device_mesh import init_device_mesh

            shard_(network, model, init_device_mesh(device.type, (processes,)))
    optimizer = optimizer_for(run, model)
    if processes > 1 and run.fsdp:
        check_sharded(optimizer)
    return run, config, model, network, optimizer


def settle(
    options: Options, *, processes: int = 1, config: PreTrainedConfig | None = None
) -> tuple[Resolved, PreTrainedConfig]:
    """The options with the published values of what is not given, and the configuration of the model to train.

    Args:
        options: what is trained and how.
        processes: how many train together.
        config: taken instead of the one that ``options.model`` names.
    """
    if options.init is not None:
        start = pretrained_config(options.init)
        config = start if config is None and options.model == options.init else config
    config = build_config(options.model) if config is None else config
    run = resolve(options, hidden_size=config.hidden_size, processes=processes)
    longest = config.to_dict().get(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    if longest is not None and run.seq_len > longest:
        raise ValueError(f"Invalid seq_len: {run.seq_len}, expected at most {longest} for {run.model}")
    if run.weights == "bf16" and run.dtype != "bf16":
        raise ValueError(f"Invalid weights: 'bf16' with dtype={run.dtype!r}, expected 'int8', 'int4' or --dtype bf16")
    if run.fsdp and processes > 1:
        check_sharding(run)
    for name, unfit in (("per_layer", run.per_layer), ("restarts", run.restarts != "none"), ("fsdp", run.fsdp)):
        if run.graph_step and unfit:
            raise ValueError(f"Invalid graph_step: True with {name}={getattr(run, name)!r}, expected one of the two")
    if run.weights in QUANTIZED and run.parameterization:
        raise ValueError(
            f"Invalid weights: {run.weights!r}, expected 'bf16' with the parameterization {run.parameterization}"
        )
    if layers := _layers(run):
        # CoLA was published with an activation of its own.
        if layers.hidden_act and "hidden_act" not in config.to_dict():
            raise ValueError(f"Invalid hidden_act: {layers.hidden_act!r}, which {config.model_type} models do not have")
        if layers.hidden_act:
            config.hidden_act = layers.hidden_act
    return run, config


def build_network(run: Resolved, config: PreTrainedConfig, device: torch.device | str) -> PreTrainedModel:
    """The model with freshly drawn or pretrained weights, ready to train; on ``device="meta"`` it takes no memory."""
    torch.manual_seed(run.seed)
    pretrained = run.init is not None and str(device) != "meta"
    # A card that has room for quantized weights may have none for those that they are made of.
    first = "cpu" if run.weights in QUANTIZED and str(device) != "meta" else device
    if pretrained:
        model = load_pretrained(str(run.init), config, dtype=DTYPES[run.dtype])
    else:
        model = build_model(config, device=first, dtype=DTYPES[run.dtype])
    if layers := _layers(run):
        parameterize_(model, layers, ranks=read_ranks(run.ranks), seed=run.seed, from_weight=pretrained)
    if run.weights in QUANTIZED:
        quantize_weights(model, bits=QUANTIZED[run.weights])
    if run.weights in QUANTIZED or pretrained:
        model.to(device)
    run.chunked_loss = run.chunked_loss and plain_head(model)
    if run.checkpointing:
        checkpoint_activations_(model, every=run.checkpoint_every)
    return model


def optimizer_for(run: Resolved, model: nn.Module) -> Optimizer:
    """The optimizer of a run over the parameters of its model; ``run.lr`` becomes the rate that it has."""
    args = parse_optimizer_args(run.optimizer_args)
    if replays(run, model):
        args["capturable"] = True
    if run.ranks and not run.parameterization:
        args["rank"] = read_ranks(run.ranks)
    optimizer = build_optimizer(run.optimizer, model, lr=run.lr, weight_decay=run.weight_decay, args=args)
    if run.weights in QUANTIZED and not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(
            f"Invalid weights: {run.weights!r} with {run.optimizer}, expected an optimizer of lowrank_optim"
        )
    if run.graph_step and not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"Invalid graph_step: True with {run.optimizer}, expected an optimizer of lowrank_optim")
    run.lr = float(optimizer.param_groups[0]["lr"])
    return optimizer


def replays(run: Resolved, model: nn.Module) -> bool:
    """``--graph-step``, where there are CUDA graphs: what is simulated steps as usual."""
    return run.graph_step and is_gpu(next(model.parameters()).device)


def read_ranks(path: str | None) -> dict[str, int] | None:
    """The ranks of ``--ranks``, None without it.

    Raises:
        ValueError: no readable file, or something else than ranks by name.
    """
    if path is None:
        return None
    try:
        ranks = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Invalid ranks: cannot read {path} ({error})") from error
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise ValueError(f"Invalid ranks: {path} is not a mapping from names to ranks")
    return ranks


def restarts_for(run: Resolved, model: nn.Module, optimizer: Optimizer) -> list[Restart]:
    """The restarts of a run, in the order in which they act."""
    args = parse_optimizer_args(run.restart_args, "restart")
    return build_restarts(run.restarts, args, model, optimizer, first=run.warmup_steps, seed=run.seed)


def start_in_backward(
    run: Resolved, optimizer: Optimizer, process_group: dist.ProcessGroup | None = None
) -> StepInBackward | None:
    """``--per-layer``: updates within the backward pass from now on; None where the run has none.

    Args:
        process_group: of processes with a copy of the model each.

    Raises:
        ValueError: an optimizer of another package.
    """
    if not run.per_layer:
        return None
    if run.accumulate > 1 and (whole := summed_whole(optimizer)):
        warnings.warn(
            f"{run.optimizer} reads whole gradients, so --per-layer with --accumulate {run.accumulate} keeps their "
            f"sums: {whole / 1e9:.3f} GB; GaLore's family and DCTAdamW with a gap sum at low rank",
            stacklevel=2,
        )
    try:
        return step_in_backward(
            optimizer,  # type: ignore[arg-type]
            accumulate=run.accumulate,
            max_norm=run.grad_clip or None,
            sum_dtype=DTYPES[run.accumulate_dtype],
            process_group=process_group,
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


def summed_whole(optimizer: Optimizer) -> int:
    """Bytes of the gradients of compressed parameters that micro-batches sum as they are."""
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(
        p.numel() * p.element_size()
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer.parts_of(p, group).subspace is not None and not optimizer.accumulates(p, group)
    )


def _layers(run: Resolved) -> LayerSpec | None:
    if not run.parameterization:
        return None
    return layer_spec(run.parameterization, parse_optimizer_args(run.parameterization_args, "parameterization"))
