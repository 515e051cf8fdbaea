"""What runs on each process of a test of FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import lowrank_optim
from tests.distributed.model import difference, model, train
from tests.optimizers import VARIANTS, build

# How the model is split; "replicated" is a mesh of two copies of it, each split over half of the processes.
PLACEMENTS = ("first axis", "long side", "replicated")
UPDATES = 20


def shard(whole: nn.Module, placement: str = "long side") -> None:
    """Split a model over all processes."""
    mesh = None
    if placement == "replicated":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "parts"))
    fully_shard(whole, mesh=mesh, shard_placement_fn=None if placement == "first axis" else lowrank_optim.long_side)


def fewer_bits(row: int) -> bool:
    """Whether a row rounds what it keeps, so that the last bit of a sum may decide over a whole unit."""
    name, options = VARIANTS[row]
    rounds = ("state_dtype", "weight_rounding", "error_feedback")
    return "8bit" in name or any(options.get(key) not in (None, "float32", "nearest", "full") for key in rounds)


def limit(row: int, dtype: str) -> float:
    """How far a row may be from one process."""
    if fewer_bits(row):
        return 0.05
    return 1e-12 if dtype == "float64" else 1e-4


def compare(rank: int, world: int, rows: list[int], dtype: str, placement: str) -> list[tuple[float, str]]:
    """Distance from one process, and how many parameters are split in which way."""
    found = []
    for row in rows:
        name, options = VARIANTS[row]
        alone, shared = model(getattr(torch, dtype)), model(getattr(torch, dtype))
        shard(shared, placement)
        first, second = (build(name, one.named_parameters(), **options) for one in (alone, shared))
        for one, optimizer in ((alone, first), (shared, second)):
            train(one, optimizer, range(UPDATES), getattr(torch, dtype))
        splits = [second.plan_of(p, second.entry(p).group).layout.split for p in shared.parameters()]
        kinds = ", ".join(f"{splits.count(kind)} {kind}" for kind in sorted(set(splits)))
        found.append((difference(alone, shared), kinds))
    return found


def save(trained: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Write a distributed checkpoint."""
    state = {"model": trained.state_dict(), "optimizer": get_optimizer_state_dict(trained, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load(trained: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Go on from one, on any number of processes."""
    state = {"model": trained.state_dict(), "optimizer": get_optimizer_state_dict(trained, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    trained.load_state_dict(state["model"])
    set_optimizer_state_dict(trained, optimizer, state["optimizer"])


def resharded(rank: int, world: int, rows: list[int], folder: str, begin: bool) -> list[float]:
    """The first or the second half of runs over a changing number of processes; how far they are from one process."""
    found = []
    for row in rows:
        name, options = VARIANTS[row]
        alone, shared = model(torch.float64), model(torch.float64)
        shard(shared)
        first, second = (build(name, one.named_parameters(), **options) for one in (alone, shared))
        train(alone, first, range(5), torch.float64)
        if begin:
            train(shared, second, range(5), torch.float64)
            save(shared, second, f"{folder}/{row}")
        else:
            load(shared, second, f"{folder}/{row}")
            for one, optimizer in ((alone, first), (shared, second)):
                train(one, optimizer, range(5, 10), torch.float64)
        found.append(difference(alone, shared))
    return found
