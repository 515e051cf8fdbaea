import json
import shlex

import pytest

from lowrank_optim.memory import plan as planning
from lowrank_optim.memory.cli import main
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain.command_line import parse_options

LINE = "plan --model llama_9m --tokens 1024 --optimizer AdamW GaLoreAdamW8bit"


def run_json(capsys, *more):
    assert main([*LINE.split(), *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_fits_and_its_command_line_is_that_of_the_trainer(capsys):
    # Less than AdamW takes with gradients and moments.
    answer = run_json(capsys, "--gpu", "0.85GB")
    plan = answer["plan"]
    assert plan["peak_bytes"] <= answer["available_bytes"] == int((0.85e9 - 0.6e9) * 0.97)
    assert plan["batch_size"] * plan["accumulate"] * plan["seq_len"] == 1024
    words = shlex.split(plan["command"])
    assert words[:2] == ["python", "train_llama.py"]
    options = parse_options(words[2:])
    assert Job(**{**vars(options), "config": None}).as_dict() == {key: plan[key] for key in Job().as_dict()}


def test_more_memory_is_never_slower(capsys, monkeypatch):
    monkeypatch.setattr(planning, "simulate", lambda _: _Fits)
    costs = [run_json(capsys, "--gpu", size)["plan"]["cost"] for size in ("0.8GB", "1GB", "24GB")]
    assert costs == sorted(costs, reverse=True)


class _Fits:
    peak_bytes = 0

    @staticmethod
    def as_dict():
        return {}


def test_nothing_fits(capsys):
    assert run_json(capsys, "--gpu", "0.62GB")["plan"] is None
    assert main([*LINE.split(), "--gpu", "0.62GB"]) == 0
    assert "No plan fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [("--gpu 24", "expected a size such as 24GB"), ("--gpu 24GB --tokens 100", "at least one sequence of 256")],
)
def test_bad_input_is_one_line(more, message, capsys):
    assert main([*LINE.split(), *more.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
