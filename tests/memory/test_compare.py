import csv
import json
import re
import sys

import pytest

from lowrank_optim.memory.cli import main
from lowrank_optim.pretrain.optimizers import accepted_arguments, low_rank_names
from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

LINE = "compare --model llama_9m llama_20m --optimizer GaLoreAdamW AdamW SGD --optimizer-args rank=16 momentum=0.9"


def run_json(capsys, line):
    assert main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_an_argument_goes_to_every_optimizer_that_has_it(capsys):
    rows = run_json(capsys, LINE)
    galore, adamw = ("GaLoreAdamW(rank=16)", "AdamW()")
    methods = [
        *((galore, "float32"), (galore, "bfloat16"), (adamw, "bfloat16"), (adamw, "float32")),
        ("SGD(momentum=0.9)", "bfloat16"),
    ]
    assert [(row["model"], row["method"], row["state_dtype"]) for row in rows] == [
        (model, *method) for model in ("llama_9m", "llama_20m") for method in methods
    ]
    wide, narrow, adamw_narrow, adamw_wide, sgd = (row["by_category"]["optimizer"] for row in rows[:5])
    assert adamw_wide == 8 * 8_995_968 and sgd == 2 * 8_995_968
    # torch's AdamW counts its steps in tensors of four bytes.
    assert 0 < adamw_narrow - 4 * 8_995_968 < 1000
    # In the same precision, moments at low rank take less.
    assert wide < adamw_wide and narrow < adamw_narrow


def test_without_names_all_methods_are_there_with_the_published_rank(capsys):
    rows = run_json(capsys, "compare --model llama_60m")
    methods = [row["method"] for row in rows]
    for name in low_rank_names():
        # The rank of APOLLOMini is one.
        ranked = "rank" in accepted_arguments(name) and name != "APOLLOMini"
        assert f"{name}(rank=128)" in methods if ranked else f"{name}()" in methods
    assert "APOLLOMini()" in methods and "AdamW()" in methods
    for layers in PARAMETERIZATIONS:
        assert any(method.endswith(f", {layers}") for method in methods)
    for row in rows:
        assert row["total_bytes"] == sum(row["by_category"].values()) > row["by_category"]["weights"] > 0


def test_a_parameterization_alone_selects_its_rows(capsys):
    rows = run_json(capsys, "compare --model llama_9m --parameterization sst")
    assert [(row["method"], row["state_dtype"]) for row in rows] == [
        ("SSTAdamW(), sst", "float32"),
        ("SSTAdamW(), sst", "bfloat16"),
    ]


def test_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = {kind: tmp_path / f"memory.{kind}" for kind in ("csv", "png", "html")}
    assert main([*LINE.split(), *(word for kind, path in paths.items() for word in (f"--{kind}", str(path)))]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(paths["csv"].open()))
    assert len(rows) == 10
    for row in rows:
        assert f"{int(row['total']) / 1e9:.3f}" in printed
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    page = paths["html"].read_text(encoding="utf-8")
    assert "<svg" in page and page.count("<tr>") == 11
    # Nothing is loaded from elsewhere.
    assert not re.search(r"(src|href)=[\"']?https?:", page.replace("xlink:href", ""))


@pytest.mark.parametrize("flag", ["--csv", "--html", "--png"])
def test_what_cannot_be_written_is_named(tmp_path, capsys, flag):
    pytest.importorskip("matplotlib")
    path = tmp_path / "missing" / "file"
    assert main(["compare", "--model", "llama_9m", "--optimizer", "SGD", flag, str(path)]) == 2
    error = capsys.readouterr().err
    assert f"Invalid {flag}: cannot write {path}" in error and error.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*LINE.split(), "--png", str(tmp_path / "memory.png")]) == 2
    assert "lowrank-optim[plots]" in capsys.readouterr().err
