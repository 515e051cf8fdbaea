"""The checkpoint of a run with ``--fsdp``: what its processes collect before it is written, and split after it is read.

Every process writes its part of the optimizer's tensors into ``shards`` by torch.distributed.checkpoint, named
``<parameter>/<key>``, as safetensors, because its own format is a pickle; ``optimizer.pt`` then has meta tensors in
their places. Either kind continues in either way, on any number of processes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import Optimizer

from lowrank_optim.optim.views import is_sharded
from lowrank_optim.pretrain.cache import TEMPORARY
from lowrank_optim.pretrain.config import UserError, line_of
from lowrank_optim.pretrain.update import Updater

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARDS = "shards"


class Gathered(NamedTuple):
    """What the first process of a sharded run saves: whole weights, and the rest of the states beside their shards."""

    model: PreTrainedModel
    states: dict[str, Any]
    shards: Path


def gather(folder: Path, step: int, update: Updater, skeleton: PreTrainedModel, *, leads: bool) -> Gathered:
    """Collect a sharded run for :func:`lowrank_optim.pretrain.checkpoint.save`, on all its processes.

    The first one must have room for all weights.

    Args:
        folder, step, update: of the run; the number of updates so far; model and optimizer.
        skeleton: the model on the meta device.
        leads: whether this is the first process.

    Raises:
        UserError: a process cannot write its part; all of them raise it.
    """
    import torch.distributed.checkpoint as dcp

    from lowrank_optim.optim.sharding import whole

    # Cleared with what killed writes leave.
    into = folder / f"{TEMPORARY}checkpoint-{step}-shards"
    weights = {}
    for name, tensor in update.model.state_dict().items():
        values = whole(tensor)
        if leads:
            # A copy: of an uneven split the whole is a view of something larger.
            weights[name] = values.to("cpu", copy=True)
    model = skeleton
    if leads:
        model = copy.deepcopy(skeleton)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    states, shards = split(update.state_dict())
    try:
        writer = dcp.HuggingFaceStorageWriter(str(into), save_distributed=True)  # type: ignore[attr-defined]
        dcp.save(shards, storage_writer=writer)  # type: ignore[attr-defined]
    # One that knows the errors of all processes.
    except Exception as error:
        raise UserError(f"Cannot save checkpoint-{step}: {line_of(error)}") from error
    return Gathered(model, states, into)


def split(states: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """States with meta tensors in place of sharded ones, and these by name."""
    optimizer = states["optimizer"]
    shards = {}
    rest = {number: dict(of_param) for number, of_param in optimizer["state"].items()}
    for group in optimizer["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            for key, value in rest.get(number, {}).items():
                if is_sharded(value):
                    shards[f"{name}/{key}"] = value
                    rest[number][key] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return {**states, "optimizer": {**optimizer, "state": rest}}, shards


def join(states: dict[str, Any], path: Path, optimizer: Optimizer) -> dict[str, Any]:
    """The states that :func:`split` took apart, with the tensors that this process needs."""
    if not (path / SHARDS).is_dir():
        return states
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from lowrank_optim.optim.sharding import room_for

    params: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        params.update(zip(group["param_names"], group["params"], strict=True))
    wanted, places = {}, {}
    for group in states["optimizer"]["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            for key, value in states["optimizer"]["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    wanted[f"{name}/{key}"] = room_for(value, params[name])
                    places[f"{name}/{key}"] = number, key
    reader = dcp.HuggingFaceStorageReader(str(path / SHARDS))  # type: ignore[attr-defined]
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())  # type: ignore[attr-defined]
    for name, (number, key) in places.items():
        states["optimizer"]["state"][number][key] = wanted[name]
    return states
