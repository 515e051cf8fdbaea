"""Training on several processes, saved on some and continued on others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.launch import start_accelerator
from lowrank_optim.pretrain.parallel import check_sharded, check_sharding
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.steps import share_of
from tests.distributed import copies
from tests.distributed.processes import run
from tests.nn.parameterizations import VARIANTS

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data"
needs_fsdp = pytest.mark.skipif(torch.__version__ < "2.11", reason="--fsdp wants torch 2.11")


def measured(folder: Path, case: str) -> Any:
    """What a case of ``tests.distributed.trainer`` measured."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.distributed.trainer", str(folder), case],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "XDG_CACHE_HOME": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])[case]


def close(found: dict[str, float], loss: float = 1e-5, weights: float = 1e-4) -> bool:
    return found["loss"] <= loss and found["weights"] <= weights


@needs_fsdp
def test_a_sharded_run_goes_on_on_one_process(tmp_path):
    assert close(measured(tmp_path, "smoke"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["copies", "shards"])
def test_saved_on_two_continued_on_one_and_four(tmp_path, case):
    found = measured(tmp_path, case)
    assert found["state"] == 0
    assert close(found["on one"]) and close(found["on four"])
    assert found["evaluations"] <= 1e-5


@pytest.mark.slow
def test_either_kind_of_checkpoint_continues_in_either_way(tmp_path):
    for name, found in measured(tmp_path, "there and back").items():
        assert close(found, loss=1e-5 if "fp32" in name else 1e-2, weights=1e-4 if "fp32" in name else 0.1), name


@pytest.mark.slow
def test_what_is_trained_in_which_way(tmp_path):
    for name, found in measured(tmp_path, "ways").items():
        assert found == {"loss": 0, "weights": 0} if "resumed" in name else close(found, weights=1e-3), name


@pytest.mark.slow
def test_what_else_belongs_to_several_processes(tmp_path):
    found = measured(tmp_path, "others")
    assert found["int8"] <= 1e-5 and found["int8, last loss"] <= 0.05
    for name in ("weights start equal", "random numbers differ", "broken shard", "accelerate", "scalar"):
        assert found[name], name
    assert "8 sequences" in found["unshared"] and "--batch-size 1 or 2" in found["unshared"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds a process in /proc")
@pytest.mark.parametrize("case", ["killed", "frozen"])
def test_a_lost_process_ends_the_run_which_continues_on_one(tmp_path, case):
    found = measured(tmp_path, case)
    assert found["seconds"] < 60 and found["status"] == 1
    assert "process 1 of 2" in found["said"]
    assert found["continued on one"]


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample of C4")
def test_two_processes_train_on_c4_and_one_continues(tmp_path):
    found = measured(tmp_path, "c4")
    assert close(found)
    assert found["validation loss, two"] < found["validation loss, untrained"] - 1


@pytest.mark.slow
def test_copies_are_one_process():
    for name, error in run(copies.everything, 2)[0].items():
        if isinstance(error, str):
            assert "split over processes" in error or "scalar parameters" in error
            assert name in ("LORO, fsdp", "SST, fsdp", "TernaryLowRank, fsdp")
        else:
            assert error <= (1e-12 if "fsdp" in name else 0), name


def test_every_parameterization_is_in_the_table():
    from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

    assert PARAMETERIZATIONS.keys() == {name.partition("-")[0].lower() for name in VARIANTS}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [0, 1, 3, 10])
def test_processes_share_an_evaluation(batches, world):
    shares = [share_of(batches, rank=rank, world=world) for rank in range(world)]
    assert sum(shares) == batches
    assert max(shares) == shares[0] and min(shares) >= shares[0] - 1


@needs_fsdp
@pytest.mark.parametrize(
    ("name", "value"), [("weights", "int8"), ("restarts", "merge"), ("restarts", "refactorize"), ("compile", True)]
)
def test_fsdp_names_what_it_cannot_do(name, value):
    settled = resolve(Options(fsdp=True, **{name: value}), hidden_size=16, processes=2)
    with pytest.raises(ValueError, match=f"^Invalid {name}: {value!r} with fsdp"):
        check_sharding(settled)


@pytest.mark.parametrize(("seen", "strategy", "message"), [(1, "NO", "2 were started and Accelerate sees 1"),
                                                          (2, "FSDP", "fsdp_version: 2 or --fsdp")])  # fmt: skip
def test_accelerate_and_the_environment_agree(monkeypatch, tmp_path, seen, strategy, message):
    import accelerate
    from accelerate.utils import DistributedType

    found = SimpleNamespace(num_processes=seen, distributed_type=DistributedType(strategy))
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: found)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        start_accelerator(Options(), tmp_path)


def test_fsdp_names_an_optimizer_that_it_cannot_take():
    check_sharded(torch.optim.AdamW([torch.zeros(2, requires_grad=True)]))
    with pytest.raises(ValueError, match="Invalid optimizer: Adafactor with fsdp"):
        check_sharded(torch.optim.Adafactor([torch.zeros(2, requires_grad=True)]))
