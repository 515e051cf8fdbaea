"""Measured runs: close to the simulation, and resumed to the last bit."""

import json

import pytest

from lowrank_optim.memory import measure as measuring
from lowrank_optim.memory.cli import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import measure
from lowrank_optim.memory.simulate import simulate

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*compresses no parameter")


def test_a_resumed_run_makes_the_same_update(tmp_path, monkeypatch):
    # Which is for the figures of the memory.
    monkeypatch.setattr(measuring, "_warm_up", lambda job: None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    job = Job(
        model=str(path), optimizer="GaLoreAdamW8bit", optimizer_args={"rank": 16}, weights="int8", per_layer=True,
        seq_len=16,
    )  # fmt: skip
    whole = measuring.run(job, updates=2, device="cpu", save=str(tmp_path))
    resumed = measuring.run(job, updates=2, device="cpu", load=str(tmp_path))
    assert len(whole.losses) == 3
    assert (resumed.losses, resumed.weight_sum) == (whole.losses[2:], whole.weight_sum)
    expected = estimate(job).by_category
    assert whole.by_category["weights"] == expected["weights"]
    assert whole.by_category["optimizer"] == expected["optimizer"]


@pytest.mark.slow
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
    job = Job(
        model="llama_60m", optimizer=name, optimizer_args={"rank": 128, "update_proj_gap": 2}, dtype=dtype,
        seq_len=64, per_layer=per_layer,
    )  # fmt: skip
    assert simulate(job).peak_bytes == pytest.approx(measure(job)[0].peak_bytes, rel=0.05)
