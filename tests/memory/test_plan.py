import json
import shlex
import subprocess
import sys

import pytest
import torch

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.outline import Outline
from lowrank_optim.memory.plan import WITHOUT_RANK, _plans, needed, parse_size
from lowrank_optim.memory.simulate import simulate, with_layers
from lowrank_optim.optim.roles import roles
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.llama import PRESETS, build_config, build_model

LINE = "plan --model llama_9m --tokens 1024 --optimizer AdamW GaLoreAdamW8bit"


def run_json(capsys, *more):
    assert main([*LINE.split(), *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_fits_and_its_command_line_is_that_of_the_trainer(capsys):
    # Less than AdamW takes with gradients and moments.
    answer = run_json(capsys, "--gpu", "0.85GB", "--simulate")
    plan = answer["plan"]
    assert plan["peak_bytes"] <= answer["available_bytes"] == int((0.85e9 - 0.6e9) * 0.97)
    assert plan["batch_size"] * plan["accumulate"] * plan["seq_len"] == 1024
    words = shlex.split(plan["command"])
    assert words[0] == "lowrank-train"
    options = parse_options(words[1:])
    assert Job(**{**vars(options), "config": None}).as_dict() == {key: plan[key] for key in Job().as_dict()}


@pytest.mark.parametrize("name", ["llama_60m", pytest.param("llama_7b", marks=pytest.mark.slow)])
def test_an_outline_has_the_parameters_of_the_model(name):
    model = build_model(with_layers(build_config(name), 1), device="meta", dtype=torch.bfloat16)

    def known(given):
        what = roles(given)
        return {path: (p.shape, p.dtype, what[path]) for path, p in given.named_parameters()}

    assert known(Outline(PRESETS[name], torch.bfloat16)) == known(model)


@pytest.mark.parametrize("name", WITHOUT_RANK)
def test_what_ours_keep_without_a_rank_is_what_is_planned_with(name):
    pytest.importorskip("bitsandbytes" if name.endswith("8bit") else "torch")
    ours, args = WITHOUT_RANK[name]
    theirs, ours = Job(model="llama_9m", optimizer=name), Job(model="llama_9m", optimizer=ours, optimizer_args=args)
    # Step counts are numbers of ours, and the tables of codes are one for all parameters.
    assert estimate(theirs).by_category["optimizer"] == pytest.approx(estimate(ours).by_category["optimizer"], rel=0.01)


@pytest.mark.slow
def test_a_plan_imports_no_compiler():
    code = f"""import sys
from lowrank_optim.memory.cli import main
main({[*LINE.split(), "--gpu", "1GB"]})
print(sorted({{"torch._dynamo", "transformers", "bitsandbytes"}} & sys.modules.keys()), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_more_memory_is_never_slower(capsys):
    costs = [run_json(capsys, "--gpu", size)["plan"]["cost"] for size in ("0.8GB", "1GB", "24GB")]
    assert costs == sorted(costs, reverse=True)


def test_nothing_fits_and_what_would(capsys):
    answer = run_json(capsys, "--gpu", "0.62GB")
    assert answer["plan"] is None and answer["next"]["predicted_bytes"] > answer["available_bytes"]
    assert main([*LINE.split(), "--gpu", "0.62GB"]) == 0
    out = capsys.readouterr().out
    assert "No plan fits" in out and answer["next"]["command"] in out
    size = needed(answer["next"]["predicted_bytes"])
    assert f"on a card of {size / 1e9:.1f} GB" in out
    assert run_json(capsys, "--gpu", f"{size / 1e9:.6f}1")["plan"]["command"] == answer["next"]["command"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24e9), ("24GB", 24e9), ("22.5 GiB", 22.5 * 2**30), ("RTX 4090", 24e9), ("4090", 24e9), ("a100 80gb", 80e9)],
)
def test_sizes_and_names_of_cards(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("optimizer", "args", "per_layer"),
    [
        pytest.param("GaLoreAdamW8bit", {"rank": 32}, True, marks=pytest.mark.slow),
        pytest.param("AdamW", {}, False, marks=pytest.mark.slow),
        pytest.param("FiraAdamW", {"rank": 32, "state_dtype": "bfloat16"}, True, marks=pytest.mark.slow),
        pytest.param("APOLLOMini", {}, False, marks=pytest.mark.slow),
    ],
)
def test_predictions_are_near_the_simulation(optimizer, args, per_layer):
    plans = _plans("llama_60m", 4096, 256, [optimizer], lambda _: None)
    wanted = Job(model="llama_60m", optimizer=optimizer, optimizer_args=args).optimizer_args
    for plan in plans:
        job = plan.job
        given = [pair for pair in job.optimizer_args if not pair.startswith("stagger")]
        if given == wanted and job.accumulate == 4 and job.per_layer == per_layer and job.weights != "int8":
            peak = simulate(job).peak_bytes
            assert plan.predicted_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--gpu 24MB", "expected a size such as 24, 24GB"),
        ("--gpu RTX4091", "did you mean RTX 4090?"),
        ("--gpu 24GB --optimizer Galor", "expected FOAM, "),
        ("--gpu 24GB --tokens 100", "at least one sequence of 256"),
    ],
)
def test_bad_input_is_one_line(more, message, capsys):
    assert main([*LINE.split(), *more.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
