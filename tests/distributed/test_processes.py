"""More than one process: FSDP2, DistributedDataParallel, checkpoints. All rows: ``python -m tests.distributed``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.distributed import LowRankAllReduce
from lowrank_optim.nn import SST, SSTLinear
from tests.distributed.fsdp import compare, load, save
from tests.distributed.model import Model, batch, difference, model, train
from tests.distributed.processes import run
from tests.optimizers import VARIANTS, build

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="fully_shard of torch 2.6 trains on a GPU only")

ROWS = [
    ("GaLoreAdamW", {}),
    ("FiraAdamW", {}),
    ("APOLLOAdamW", {}),
    ("GaLoreAdamW8bit", {}),
    ("Trion", {"update_proj_gap": 1}),
    ("LDAdamW", {"update_proj_gap": 1}),
    ("GaLoreAdafactor", {"beta1": 0.9, "moments": "rotate"}),
]
DOUBLE = torch.float64


def sharded(dtype: torch.dtype = DOUBLE) -> Model:
    made = model(dtype)
    fully_shard(made, shard_placement_fn=lowrank_optim.long_side)
    return made


def everything(rank: int, world: int, folder: str) -> dict[str, Any]:
    """All checks of one start of the processes; what they measured."""
    found: dict[str, Any] = {}
    rows = [VARIANTS.index(row) for row in ROWS]
    for row, result in zip(ROWS, compare(rank, world, rows, "float64", "first axis", folder, updates=5)):
        found[f"fsdp {row[0]}"] = result.error
        found["not finite"] = result.skipped and found.get("not finite", True)
    found["checkpoint"] = saved_and_resumed(folder)
    found["per layer"] = per_layer(rank)
    found["hook"], found["saved traffic"] = low_rank_traffic(rank, world)
    found["reducer"] = own_reducer(rank, world)
    found["words"] = refusals()
    found["explained"] = {row.name: row.reason for row in build("DCTAdamW", sharded().named_parameters()).explain()}
    return found


def saved_and_resumed(folder: str) -> float:
    """A run that goes on from a distributed checkpoint against one that was not interrupted."""
    runs = []
    for interrupted in (False, True):
        trained = sharded()
        optimizer = build("GaLoreAdamW8bit", trained.named_parameters())
        train(trained, optimizer, range(5), DOUBLE)
        if interrupted:
            save(trained, optimizer, folder)
            trained = sharded()
            optimizer = build("GaLoreAdamW8bit", trained.named_parameters())
            load(trained, optimizer, folder)
        train(trained, optimizer, range(5, 9), DOUBLE)
        runs.append(trained)
    return difference(*runs)


def per_layer(rank: int) -> float:
    """Updates in the backward pass of a sharded model, with clipping and micro-batches, against one process."""
    runs = []
    for split in (False, True):
        trained = sharded() if split else model(DOUBLE)
        optimizer = build("GaLoreAdamW", trained.named_parameters())
        group = None if split else dist.group.WORLD
        handle = lowrank_optim.step_in_backward(
            optimizer, accumulate=2, two_phase=False, max_norm=0.1, process_group=group
        )
        for update in range(6):
            for half in range(2):
                with handle.micro_batch():
                    (trained(batch(2 * update + half, DOUBLE)) / 2).backward()
        runs.append(trained)
        handle.remove()
    return difference(*runs)


def low_rank_traffic(rank: int, world: int) -> tuple[float, float]:
    """DistributedDataParallel with R in place of G against the mean gradient; how many times fewer bytes it sends."""
    alone, shared = model(DOUBLE), model(DOUBLE)
    wrapped = DistributedDataParallel(shared)
    first, second = (build("GaLoreAdamW", one.named_parameters(), update_proj_gap=6) for one in (alone, shared))
    traffic = LowRankAllReduce(wrapped, second)
    for update in range(12):
        first.zero_grad(), second.zero_grad()
        parts = batch(update, DOUBLE).chunk(world)
        sum(alone(part) / world for part in parts).backward()
        wrapped(parts[rank]).backward()
        first.step(), second.step()
    # By hand: what is compressed goes as rows x rank, but all of it in updates 1 and 7.
    full = sum(p.numel() for p in shared.parameters())
    low = sum(max(p.shape) * 4 if p.ndim == 2 else p.numel() for p in shared.parameters() if p is not shared.experts)
    low += 3 * 20 * 4
    assert traffic.sent == 8 * (2 * full + 10 * low), (traffic.sent, full, low)
    assert traffic.whole == 8 * 12 * full
    return difference(alone, shared), traffic.whole / traffic.sent


def own_reducer(rank: int, world: int) -> float:
    """Per-layer updates that take the mean of sums at low rank, against one process that sees all micro-batches."""
    runs = []
    for processes in (1, world):
        trained = model(DOUBLE)
        optimizer = build("GaLoreAdamW", trained.named_parameters())
        group = None if processes == 1 else dist.group.WORLD
        # Alone, one process goes through the micro-batches of all of them; its first basis is that of their mean.
        handle = lowrank_optim.step_in_backward(optimizer, accumulate=2, process_group=group or dist.group.WORLD)
        for update in range(8):
            for half in range(2):
                parts = batch(2 * update + half, DOUBLE).chunk(world)
                mine = parts if processes == 1 else parts[rank : rank + 1]
                with handle.micro_batch():
                    (sum(trained(part) for part in mine) / len(mine) / 2).backward()
        runs.append(trained)
        handle.remove()
    return difference(*runs)


def refusals() -> list[str]:
    """The first words of every error."""
    said = []
    trained = model(torch.float32)
    lowrank_optim.step_in_backward(build("GaLoreAdamW", trained.named_parameters()))
    with pytest.raises(RuntimeError) as drift:
        trained(batch(0, torch.float32)).backward()
    said.append(str(drift.value))
    flattened = FullyShardedDataParallel(model(torch.float32), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError) as flat:
        build("GaLoreAdamW", flattened.named_parameters())
    said.append(str(flat.value))
    layers = nn.Sequential(SSTLinear(20, 20, SST(rank=4)))
    fully_shard(layers)
    with pytest.raises(ValueError) as split:
        lowrank_optim.SSTAdamW(lowrank_optim.spectral_groups(layers))
    said.append(str(split.value))
    parted = list(sharded().named_parameters())
    optimizer = build("GaLoreAdamW", parted, state_dtype="int4")
    with pytest.raises(ValueError) as nibbles:
        optimizer.slots_of(parted[0][1], optimizer.param_groups[0])
    said.append(str(nibbles.value))
    return said


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(everything, 2, str(tmp_path_factory.mktemp("checkpoint")))[0]


@pytest.mark.parametrize("name", [row[0] for row in ROWS])
def test_fsdp_is_one_process(results, name):
    assert results[f"fsdp {name}"] <= 1e-12


def test_a_distributed_checkpoint_continues_exactly(results):
    assert results["checkpoint"] == 0


def test_all_processes_leave_out_an_update_together(results):
    assert results["not finite"]


def test_per_layer_updates_of_a_sharded_model(results):
    assert results["per layer"] <= 1e-12


def test_low_rank_traffic(results):
    assert results["hook"] <= 1e-12
    assert results["saved traffic"] > 1.5


def test_per_layer_updates_with_a_process_group(results):
    assert results["reducer"] <= 1e-12


def test_words(results):
    drift, flat, split, nibbles = results["words"]
    assert "Invalid state_dtype: 'int4' for a sharded parameter" in nibbles
    assert "split over processes" in split
    assert "process_group" in drift
    assert "fully_shard" in flat


def test_explain_says_how_a_parameter_is_split(results):
    said = {name: reason.rpartition(": ")[2] for name, reason in results["explained"].items()}
    assert said["up.weight"] == "rows"
    assert said["up.bias"] == "elements"
    # 53 columns are not to be halved, so its rows are split, which DCT-AdamW compresses.
    assert said["down.weight"] == "whole"


@pytest.mark.slow
def test_every_row():
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "tests.distributed"], cwd=folder, check=True)
