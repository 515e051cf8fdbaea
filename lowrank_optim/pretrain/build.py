"""From options to model and optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from lowrank_optim.nn import quantize_weights
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.in_backward import StepInBackward, step_in_backward
from lowrank_optim.pretrain.config import Options, Resolved, UserError, user_errors
from lowrank_optim.pretrain.llama import build_config, build_model
from lowrank_optim.pretrain.optimizers import build_optimizer, parse_optimizer_args
from lowrank_optim.pretrain.parameterizations import parameterize_, plan_parameterization
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.report import DTYPES

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel


def build(
    options: Options, device: torch.device | str, processes: int
) -> tuple[Resolved, LlamaConfig, PreTrainedModel, Optimizer]:
    """Options with the published values, configuration, model, and optimizer; ``device`` may be "meta".

    Raises:
        UserError: options that contradict each other or are out of range.
    """
    with user_errors(ImportError):
        config = build_config(options.model)
        run = resolve(options, hidden_size=config.hidden_size, processes=processes)
        if run.seq_len > config.max_position_embeddings:
            raise UserError(
                f"Invalid seq_len: {run.seq_len}, expected at most {config.max_position_embeddings} for {run.model}"
            )
        if run.weights == "bf16" and run.dtype != "bf16":
            raise UserError(f"Invalid weights: 'bf16' with dtype={run.dtype!r}, expected 'int8' or --dtype bf16")
        layers = None
        if run.parameterization:
            pairs = parse_optimizer_args(run.parameterization_args, "parameterization")
            layers = plan_parameterization(run.parameterization, pairs)
            config.hidden_act = layers.hidden_act or config.hidden_act
        torch.manual_seed(run.seed)
        # A card that has room for int8 weights may have none for those that they are made of.
        first = "cpu" if run.weights == "int8" and str(device) != "meta" else device
        model = build_model(config, device=first, dtype=DTYPES[run.dtype])
        if layers:
            parameterize_(model, layers, seed=run.seed)
        if run.weights == "int8":
            quantize_weights(model)
            model.to(device)
        args = parse_optimizer_args(run.optimizer_args)
        optimizer = build_optimizer(run.optimizer, model, lr=run.lr, weight_decay=run.weight_decay, args=args)
        if run.weights == "int8" and not isinstance(optimizer, LowRankOptimizer):
            raise UserError(f"Invalid weights: 'int8' with {run.optimizer}, expected an optimizer of lowrank_optim")
    run.lr = float(optimizer.param_groups[0]["lr"])
    return run, config, model, optimizer


def start_in_backward(run: Resolved, optimizer: Optimizer) -> StepInBackward:
    """``--per-layer``: updates within the backward pass from now on.

    Raises:
        UserError: an optimizer of another package.
    """
    with user_errors(TypeError):
        return step_in_backward(
            optimizer,  # type: ignore[arg-type]
            accumulate=run.accumulate,
            max_norm=run.grad_clip or None,
            sum_dtype=DTYPES[run.accumulate_dtype],
        )
