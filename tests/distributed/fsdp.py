"""What runs on each process of a test of FSDP2."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import lowrank_optim
from lowrank_optim.optim import state_storage
from lowrank_optim.optim.sharding import shards_of
from tests.distributed.model import Model, distance, model, train, whole
from tests.optimizers import IDS, VARIANTS, build

# How the model is split; "replicated" is a mesh of two copies of it, each split over half of the processes.
PLACEMENTS = ("first axis", "long side", "replicated")
UPDATES = 20
# After so many updates, on so many processes, a run is saved.
CHAIN = {5: 2, 10: 1, 15: 4, 20: 2}
# Weights end to end, and weights or all moments of a run with given gradients, so that only optimizers are compared.
DTYPES = ("float64", "float32", "bfloat16", "int8")
# The sign of what is nearly zero makes a whole step of a rounding, which a run end to end takes further.
SIGNS = ("FRUGALAdamW",)


class Result(NamedTuple):
    """Of one row of the table.

    error: the largest distance from one process; None where the optimizer refuses the row.
    splits: how many parameters are split in which way, or the refusal.
    skipped: whether a gradient that is not finite on one process left its parameter alone on all, and no other.
    """

    error: float | None
    splits: str
    skipped: bool | None = None


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
    if VARIANTS[row][0] in SIGNS and dtype != "float64":
        # A few values of either sign.
        return 0.1
    if dtype in ("bfloat16", "int8") or fewer_bits(row):
        return 0.05
    return 1e-12 if dtype == "float64" else 1e-4


def end_to_end(row: int, dtype: str) -> bool:
    """Whether a row trains on gradients of its own weights; the others get the same ones on any number of processes.

    The signs of singular vectors, which moments see, are those that LAPACK found: in float32 a rounding may turn one.
    """
    name, options = VARIANTS[row]
    turned = dtype == "float32" and options.get("refresh") == "svd"
    return dtype in ("float64", "float32") and name not in SIGNS and not turned


def made(row: int, dtype: str) -> tuple[Model, dict[str, Any]]:
    """The model of a row, and the options of its optimizer."""
    precision = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(dtype, torch.float32)
    options = VARIANTS[row][1] | ({"state_dtype": "int8"} if dtype == "int8" else {})
    return model(precision), options


def advance(row: int, trained: nn.Module, optimizer: Optimizer, updates: range, dtype: str) -> None:
    """Some updates of a row, end to end or with given gradients."""
    if end_to_end(row, dtype):
        train(trained, optimizer, updates, getattr(torch, dtype))
        return
    with small_moments_too() if dtype == "int8" else nullcontext():
        for update in updates:
            for name, p in trained.named_parameters():
                p.grad = given(name, p, update)
            optimizer.step()


def given(name: str, param: Tensor, update: int) -> Tensor:
    """A gradient of low rank with some noise, the same on any number of processes."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {update}".encode()))
    grad = torch.randn(param.shape, generator=generator)
    if param.ndim > 1:
        sides = [torch.randn(*param.shape[:-2], side, 3, generator=generator) for side in param.shape[-2:]]
        grad = (0.3 * grad + sides[0] @ sides[1].mT).contiguous()
    grad = grad.to(param.dtype)
    if not isinstance(param, DTensor):
        return grad
    shards = shards_of(param)
    part = shards.take(grad, shards.axis).contiguous()
    placed: Tensor = DTensor.from_local(
        part, shards.mesh, shards.placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )
    return placed


@contextmanager
def small_moments_too() -> Iterator[None]:
    """Store moments in 8 bits whatever their size."""
    before, state_storage.MIN_8BIT_SIZE = state_storage.MIN_8BIT_SIZE, 1
    try:
        yield
    finally:
        state_storage.MIN_8BIT_SIZE = before


def alone(row: int, dtype: str, folder: Path) -> dict[int, list[Tensor]]:
    """The parameters that one process has at every number of updates in :data:`CHAIN`."""
    file = folder / f"{row} {dtype}.pt"
    if not file.exists():
        trained, options = made(row, dtype)
        optimizer, found, done = build(VARIANTS[row][0], trained.named_parameters(), **options), {}, 0
        for updates in CHAIN:
            advance(row, trained, optimizer, range(done, updates), dtype)
            done, found[updates] = updates, [p.detach().clone() for p in trained.parameters()]
        torch.save(found, file)
    loaded: dict[int, list[Tensor]] = torch.load(file)
    return loaded


def share(rank: int, world: int, rows: list[int], dtype: str, folder: Path) -> None:
    """Let every process run some of the rows alone, for all."""
    for row in rows[rank::world]:
        alone(row, dtype, folder)
    dist.barrier()


def compare(
    rank: int, world: int, rows: list[int], dtype: str, placement: str, folder: str, show: bool = False
) -> list[Result]:
    """Rows against one process, whose runs are kept in ``folder``."""
    kept, found = Path(folder), []
    share(rank, world, rows, dtype, kept)
    for row in rows:
        result = compared(rank, row, dtype, placement, kept)
        found.append(result)
        if show and rank == 0:
            bound = limit(row, dtype)
            met = "" if result.error is None or result.error <= bound else f"  MISSED {bound:g}"
            error = " refused" if result.error is None else f"{result.error:8.1e}"
            print(f"{IDS[row]:100.100} {error}  {result.splits}{met}", flush=True)
    return found


def compared(rank: int, row: int, dtype: str, placement: str, folder: Path) -> Result:
    """One row."""
    shared, options = made(row, dtype)
    shard(shared, placement)
    second = build(VARIANTS[row][0], shared.named_parameters(), **options)
    try:
        advance(row, shared, second, range(UPDATES), dtype)
    except ValueError as error:
        return Result(None, str(error).partition(",")[0])
    splits = [second.plan_of(p, second.entry(p).group).layout.split for p in shared.parameters()]
    kinds = ", ".join(f"{splits.count(kind)} {kind}" for kind in sorted(set(splits)))
    error = distance(alone(row, dtype, folder)[UPDATES], shared.parameters())
    return Result(error, kinds, one_bad_shard(rank, shared, second) if dtype == "float64" else None)


def one_bad_shard(rank: int, trained: nn.Module, optimizer: Optimizer) -> bool:
    """Whether a NaN in the shard of one process leaves its parameter alone on all, and the others move."""
    before = [whole(p).clone() for p in trained.parameters()]
    for name, p in trained.named_parameters():
        p.grad = given(name, p, UPDATES)
        if rank == 1 and name == "up.weight":
            p.grad.to_local().view(-1)[0] = torch.nan
    optimizer.step()
    moved = [not torch.equal(old, whole(p)) for old, p in zip(before, trained.parameters())]
    names = [name for name, _ in trained.named_parameters()]
    return [name for name, did in zip(names, moved) if not did] == ["up.weight"]


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


def resharded(rank: int, world: int, rows: list[int], folder: str, updates: int) -> list[float | None]:
    """One part of runs over a changing number of processes, up to ``updates``; how far they are from one process."""
    found: list[float | None] = []
    share(rank, world, rows, "float64", Path(folder))
    for row in rows:
        name, options = VARIANTS[row]
        shared = model(torch.float64)
        shard(shared)
        optimizer = build(name, shared.named_parameters(), **options)
        begins = max((end for end in CHAIN if end < updates), default=0)
        try:
            if begins:
                load(shared, optimizer, f"{folder}/{row} after {begins}")
            advance(row, shared, optimizer, range(begins, updates), "float64")
        except ValueError:
            found.append(None)
            continue
        save(shared, optimizer, f"{folder}/{row} after {updates}")
        found.append(distance(alone(row, "float64", Path(folder))[updates], shared.parameters()))
    return found
