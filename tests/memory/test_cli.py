import json
import runpy
import sys

import pytest

from lowrank_optim.memory.cli import main

GALORE = ["estimate", "--model", "llama_9m", "--optimizer", "GaLoreAdamW", "--optimizer-args", "rank=16"]


def run_json(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys):
    answer = run_json(capsys, *GALORE)
    assert answer["total_bytes"] == sum(answer["by_category"].values())
    assert list(answer["by_category"]) == ["weights", "gradients", "optimizer", "activations", "other"]
    assert answer["not_included"] == ["activations", "other"]
    assert sum(answer["optimizer_by_key"].values()) == answer["by_category"]["optimizer"]
    # 8,995,968 parameters of two bytes
    assert answer["by_category"]["weights"] == answer["by_category"]["gradients"] == 2 * 8_995_968
    # The rest is published for the size.
    assert answer["optimizer_args"] == {"rank": 16, "update_proj_gap": 200, "scale": 0.25}
    assert answer["dtype"] == "bfloat16"


def test_a_job_is_read_from_the_file_of_a_run(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: llama_9m\noptimizer: GaLoreAdamW\noptimizer_args: {rank: 16}\nlr: 0.1\n")
    from_file = run_json(capsys, "estimate", "--config", str(tmp_path / "run.yaml"))
    assert from_file == run_json(capsys, *GALORE)
    # The line overrides the file.
    other = run_json(capsys, "estimate", "--config", str(tmp_path / "run.yaml"), "--dtype", "fp32")
    assert other["dtype"] == "float32"


def test_dtype(capsys):
    bf16, fp32 = (run_json(capsys, *GALORE, "--dtype", dtype) for dtype in ("bf16", "fp32"))
    assert fp32["by_category"]["weights"] == 2 * bf16["by_category"]["weights"]


def test_sheet_shows_both_units_and_what_is_missing(capsys):
    assert main(["estimate", "--model", "llama_7b", "--optimizer", "AdamW"]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights = next(line.split() for line in lines if line.startswith("weights"))
    assert weights == ["weights", "13,476,831,232", "13.477", "12.551"]
    assert next(line for line in lines if line.startswith("activations")).endswith("not estimated")
    assert "GB = 10^9 bytes, GiB = 2^30 bytes." in lines


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["estimate", "--model", "llama_7", "--optimizer", "AdamW"], "did you mean llama_7b?"),
        (["estimate", "--model", "llama_9m", "--optimizer", "GaLorAdamW"], "did you mean GaLoreAdamW?"),
        ([*GALORE, "rnk=3"], "did you mean rank?"),
        ([*GALORE, "scale"], "'scale', expected key=value"),
        ([*GALORE, "scale=-1"], "Invalid scale: -1"),
        ([*GALORE, "betas=0.9"], "betas"),
        ([*GALORE, "--dtype", "int3"], "invalid choice: 'int3'"),
        ([*GALORE, "--batch-size", "0"], "Invalid batch_size: 0, expected a positive number"),
        ([*GALORE, "--weights", "int3"], "invalid choice: 'int3'"),
        ([*GALORE, "--bogus"], "--bogus"),
        (["compare", "--model", "llama_9m", "--optimizer", "AdamW", "--optimizer-args", "rank=1"], "'rank'"),
        (["compare", "--model", "llama_9m", "--optimizer-args", "rnk=1"], "did you mean rank?"),
        (["measure", "--model", "llama_9m", "--checkpoint", f"{__file__}/x"], "Invalid --checkpoint: cannot write"),
        (["measure", "--model", "llama_9m", "--learning-rate", "1"], "--learning-rate; --help lists"),
        (["measure", "--model", "llama_9m", "--updates", "x"], "invalid value: 'x', expected a positive int"),
        (["weigh"], "'weigh'"),
        ([], "COMMAND"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_bad_input_gets_one_line_and_status_2(capsys, argv, expected):
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert expected in output.err
    assert output.err.startswith("lowrank-memory: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model_type": "t5"}',
        '{"hidden_size": "wide"}',
        '{"num_attention_heads": 0}',
        '{"hidden_act": "nope", "num_hidden_layers": 1}',
    ],
)
def test_broken_config_gets_one_line_and_status_2(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert main(["estimate", "--model", str(tmp_path), "--optimizer", "AdamW"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("lowrank-memory: Invalid model")
    assert output.err.count("\n") == 1


def test_a_rank_that_compresses_nothing_is_said_in_one_line(capsys):
    assert main([*GALORE[:-1], "rank=4096"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("lowrank-memory: ")
    assert "compresses no parameter" in error
    assert error.count("\n") == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lowrank-memory ")


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lowrank-memory", *GALORE, "--json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lowrank_optim.memory", run_name="__main__")
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["optimizer"] == "GaLoreAdamW"
