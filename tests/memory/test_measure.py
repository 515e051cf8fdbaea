"""Measured runs: close to the simulation, and resumed to the last bit."""

import json

import pytest

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import measure
from lowrank_optim.memory.simulate import simulate

pytestmark = pytest.mark.filterwarnings("ignore:.*compresses no parameter")


def test_command_line_with_checkpoint(tmp_path, capsys):
    line = (
        "measure --model llama_9m --optimizer GaLoreAdamW8bit --optimizer-args rank=32 --weights int8 --per-layer "
        f"--checkpointing --seq-len 16 --updates 1 --device cpu --checkpoint {tmp_path} --json"
    )
    assert main(line.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["peak_bytes"] == sum(answer["by_category"].values())
    assert answer["by_category"]["weights"] == answer["estimate"]["by_category"]["weights"]
    assert answer["by_category"]["optimizer"] == answer["estimate"]["by_category"]["optimizer"]
    # The update after the checkpoint, without a break and from the checkpoint.
    assert len(answer["losses"]) == 2
    assert answer["resumed"]["losses"] == answer["losses"][1:]
    assert answer["resumed"]["weight_sum"] == answer["weight_sum"]


def test_another_optimizer_has_no_per_layer_updates(capsys):
    line = "simulate --model llama_9m --optimizer AdamW --per-layer --seq-len 16"
    assert main(line.split()) == 2
    assert "cannot update one parameter at a time" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "DCTAdamW", "FiraAdamW", "APOLLOAdamW"])
def test_simulation_within_five_percent_of_a_run(name, dtype, per_layer):
    job = Job("llama_60m", name, {"rank": 128, "update_proj_gap": 2}, dtype=dtype, seq_len=64, per_layer=per_layer)
    assert simulate(job).peak_bytes == pytest.approx(measure(job)[0].peak_bytes, rel=0.05)
