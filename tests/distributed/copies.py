"""Optimizers and parameterizations on copies of a model (DistributedDataParallel), the latter under FSDP2 too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.nn import convert, quantize_weights
from tests.distributed.model import batch, difference, model
from tests.nn import parameterizations
from tests.optimizers import VARIANTS, build

UPDATES = 14


def optimizers(rank: int, world: int, rows: list[int]) -> list[float]:
    """Rows of the optimizer table on copies, each with its part of a batch, against one process with all parts."""
    found = []
    for row in rows:
        name, options = VARIANTS[row]
        alone, shared = model(torch.float64), model(torch.float64)
        wrapped = DistributedDataParallel(shared)
        first, second = (build(name, one.named_parameters(), **options) for one in (alone, shared))
        for update in range(UPDATES):
            first.zero_grad(), second.zero_grad()
            parts = batch(update, torch.float64).chunk(world)
            sum(alone(part) / world for part in parts).backward()
            wrapped(parts[rank]).backward()
            first.step(), second.step()
        found.append(difference(alone, shared))
    return found


def layers(rank: int, world: int, names: list[str], way: str) -> list[float | str]:
    """The same for parameterizations, with their restarts and optimizers; "fsdp" splits them, with AdamW alone.

    Returns:
        Differences, or the words of a refusal.
    """
    found: list[float | str] = []
    for name in names:
        variant = parameterizations.VARIANTS[name]
        both = []
        for _ in range(2):
            made = parameterizations.block().double()
            convert(made, variant.options, parameterizations.TARGETS, seed=1)
            both.append(made)
        alone, shared = both
        network: nn.Module = shared
        try:
            if way == "fsdp":
                fully_shard(shared, shard_placement_fn=lowrank_optim.long_side)
            else:
                network = DistributedDataParallel(shared)
            optimizers = [variant.optimizer(one) for one in both]
        except ValueError as error:
            found.append(str(error))
            continue
        restarts = [() if way == "fsdp" else variant.restarts(*pair) for pair in zip(both, optimizers)]
        for update in range(UPDATES):
            for optimizer in optimizers:
                optimizer.zero_grad()
            numbers = range(world * update, world * (update + 1))
            sum(parameterizations.loss_of(alone, number) / world for number in numbers).backward()
            parameterizations.loss_of(network, numbers[rank]).backward()
            for optimizer, acting in zip(optimizers, restarts):
                optimizer.step()
                for restart in acting:
                    restart.after_step(update + 1)
        found.append(difference(alone, shared))
    return found


def quantized(rank: int, world: int, bits: int) -> float:
    """Weights in int8 or int4 on copies: the largest difference of codes and scales."""
    both = [parameterizations.block(width=32, hidden=48) for _ in range(2)]
    for made in both:
        quantize_weights(made, parameterizations.TARGETS, bits=bits)
    alone, shared = both
    wrapped = DistributedDataParallel(shared, init_sync=False)
    first, second = (build("GaLoreAdamW", one.named_parameters(), lr=1e-2) for one in both)
    before = {name: tensor.clone() for name, tensor in alone.named_buffers()}
    for update in range(UPDATES):
        first.zero_grad(), second.zero_grad()
        numbers = range(world * update, world * (update + 1))
        sum(parameterizations.loss_of(alone, number) / world for number in numbers).backward()
        parameterizations.loss_of(wrapped, numbers[rank]).backward()
        first.step(), second.step()
    pairs = list(zip(alone.named_buffers(), shared.buffers()))
    assert any(not torch.equal(tensor, before[name]) for (name, tensor), _ in pairs)
    return max(float((one.double() - other.double()).abs().max()) for (_, one), other in pairs)


def few(rank: int, world: int) -> dict[str, Any]:
    """One of each kind."""
    return {
        "SLTrain": layers(rank, world, ["SLTrain"], "ddp")[0],
        "SLTrain, split": layers(rank, world, ["SLTrain"], "fsdp")[0],
        "int8": quantized(rank, world, 8),
    }


def everything(rank: int, world: int) -> dict[str, Any]:
    """All rows of both tables."""
    rows = range(len(VARIANTS))
    found: dict[str, Any] = {f"{VARIANTS[row]}": error for row, error in zip(rows, optimizers(rank, world, [*rows]))}
    names = list(parameterizations.VARIANTS)
    for way in ("ddp", "fsdp"):
        found |= {f"{name}, {way}": error for name, error in zip(names, layers(rank, world, names, way))}
    return found | {f"int{bits}": quantized(rank, world, bits) for bits in (8, 4)}
