"""What each of several devices stores and moves: formulas against the real step of the first of many processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.devices import Devices, footprint
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.simulate_devices import simulate_sharded

# What single numbers may take: flags, norms, the largest entries of products.
A_FEW = 4096

ROWS = [
    ("GaLoreAdamW", {}, 8),
    ("AdamW", {}, 8),
    # Sides that it does not divide: one weight is split along its columns, all parts are rounded up.
    ("GaLoreAdamW", {}, 3),
    ("GaLoreAdamW", {"refresh": "svd"}, 8),
    ("GaLoreAdamW", {"refresh": "randomized"}, 8),
    ("GaLoreAdamW8bit", {}, 3),
    ("FiraAdamW", {}, 3),
    ("APOLLOAdamW", {"state_dtype": "bfloat16"}, 8),
    ("FRUGALAdamW", {}, 8),
    ("DCTAdamW", {"update_proj_gap": 3}, 8),
    ("LDAdamW", {}, 8),
    ("Trion", {}, 8),
    ("GaLoreAdafactor", {}, 8),
    ("Muon", {}, 8),
    ("RACS", {}, 3),
]


def job(optimizer: str, args: dict[str, Any]) -> Job:
    rank = {} if optimizer in ("AdamW", "Muon", "RACS") else {"rank": 16}
    return Job(model="llama_9m", optimizer=optimizer, optimizer_args={**args, **rank}, seq_len=8)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="older gathers know no fake tensors")
@pytest.mark.parametrize(
    ("optimizer", "args", "number"),
    [ROWS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in ROWS[1:])],
    ids=str,
)
def test_the_formulas_are_what_the_first_process_does(optimizer: str, args: dict[str, Any], number: int) -> None:
    found = footprint(job(optimizer, args), Devices(number, "fsdp"))
    real = simulate_sharded(job(optimizer, args), number, layers=4)
    assert (found.weights, found.gradients) == (real.weights, real.gradients)
    assert found.optimizer == pytest.approx(real.optimizer, rel=0.01)
    assert found.model == real.model
    for ours, theirs in ((found.update, real.update), (found.refresh, real.refresh)):
        assert ours == pytest.approx(theirs, rel=0.01, abs=A_FEW)
    # Beside them there are tokens here, and temporaries of an update.
    assert found.stored == pytest.approx(real.peak, rel=0.1)


def test_copies_store_all_and_send_gradients_twice() -> None:
    found = footprint(job("GaLoreAdamW", {}), Devices(4, "ddp"))
    alone = estimate(job("GaLoreAdamW", {}))
    assert [found.weights, found.gradients, found.optimizer] == [
        alone.by_category[key] for key in ("weights", "gradients", "optimizer")
    ]
    assert found.sent(Devices(4, "ddp")) == found.gradients * 2 * 3 // 4
    # All but 16 of 128 columns of every matrix are left out, but not in one update of 200.
    matrices = alone.low_rank_parameters * torch.bfloat16.itemsize
    saved = (found.gradients - found.low_rank.reduced) / matrices
    assert saved == pytest.approx(1 - 16 / 128, abs=1e-6)
    low, whole = found.low_rank.sent(4), found.model.sent(4)
    assert found.sent_at_low_rank(Devices(4, "ddp")) == pytest.approx(low + (whole - low) / 200, rel=1e-6)


LINE = "plan --model llama_9m --gpu 2GB --tokens 4096 --optimizer GaLoreAdamW --json"


def test_a_plan_for_several_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE.split(), "--devices", "16"]) == 0
    answer = json.loads(capsys.readouterr().out)
    plan = answer["plan"]
    assert plan["batch_size"] * plan["accumulate"] * plan["seq_len"] * 16 == 4096
    assert plan["devices"] == 16 and plan["sent_bytes"] > 0
    assert plan["command"].startswith("torchrun --nnodes 2 --nproc_per_node 8 --no-python lowrank-train ")
    assert ("--fsdp" in plan["command"]) == (plan["strategy"] == "fsdp")
    main([*LINE.split(), "--devices", "16", "--strategy", "ddp"])
    copies = json.loads(capsys.readouterr().out)["plan"]
    assert copies["strategy"] == "ddp" and copies["cost"] >= plan["cost"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--devices 3", "expected as many sequences of 256 on each of 3 devices"),
        ("--devices 2 --simulate", "expected --strategy ddp or one device"),
    ],
)
def test_what_cannot_be_planned(more: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE.split(), *more.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
