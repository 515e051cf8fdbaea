"""``lowrank-train`` and its subcommands, from one run of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowrank_optim.cli.main import COMMANDS, main
from lowrank_optim.pretrain.command_line import CONFIGS, ELSEWHERE, FIELDS, SYNONYMS, parse_options
from lowrank_optim.pretrain.metrics import read_metrics
from lowrank_optim.pretrain.page import Series, chart
from tests.pretrain.conftest import MODEL

LINE = "--optimizer-args rank=4 update_proj_gap=2 --lr 0.02 --seq-len 24 --batch-size 4 --max-steps 4 --eval-every 2"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(MODEL))
    words = ["the", "small", "red", "dog", "runs", "and", "sees", "a", "cat", "under", "one", "tree"]
    texts = [" ".join(words[start:] + words[:start]) for start in range(len(words))] * 12
    (folder / "text.txt").write_text("\n\n".join(texts))
    out = folder / "<run> & co"
    line = ["--model", str(folder / "config.json"), "--dataset", str(folder / "text.txt"), "--output-dir", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["train", *line, *LINE.split(), "--sample-tokens", "4"]) == 0
    return out


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all that are opened are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> Tags:
    """The tags of a page that is well-formed and asks for nothing from elsewhere."""
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not any({"src", "href"} & attrs.keys() for _, attrs in tags.tags)
    assert not re.search(r"url\(|@import|https?:", page)
    assert "prefers-color-scheme:dark" in page
    return tags


def test_the_report_shows_the_run(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    tags = checked(page)
    for title in ("Loss", "Learning rate", "Gradient norm", "Memory, GiB", "Seconds spent in refreshes", "by layer"):
        assert title in page
    assert "<td>optimizer_args</td><td>rank=4 update_proj_gap=2 scale=0.25</td>" in page
    assert "&lt;run&gt; &amp; co" in page and "<run>" not in page
    rows = read_metrics(run / "metrics.jsonl")
    # One shade a layer and update, and a line over as many points as there are losses.
    assert sum(tag == "rect" for tag, _ in tags.tags) == 2 * 4
    points = [str(attrs["points"]).split() for tag, attrs in tags.tags if tag == "polyline"]
    assert len(points[0]) == sum("loss" in row for row in rows) == 4
    assert len(points[1]) == sum("eval_loss" in row for row in rows) == 3


def test_generate_is_the_same_for_a_seed(run: Path, capsys: Any) -> None:
    texts = []
    for path in (run, run / "checkpoint-4"):
        assert main(["generate", str(path), "--prompt", "the small", "--tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the small")
    assert main(["generate", str(run), "--prompt", "", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", str(run), "--seed", str(2**63)]) == 2
    assert "Invalid seed" in capsys.readouterr().err


def test_evaluate_finds_the_loss_of_the_run(run: Path, capsys: Any) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    last = [row["eval_loss"] for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row][-1]
    assert answer["loss"] == pytest.approx(last, rel=1e-6)


def test_compare_writes_a_table_and_a_picture(run: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", str(run), str(run), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.count("GaLoreAdamW rank=4") == 2
    tags = checked(page.read_text(encoding="utf-8"))
    assert sum(tag == "polyline" for tag, _ in tags.tags) == 4
    assert main(["compare", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["updates"] == 4 and row["model"].endswith("config.json")


def test_list_names_what_can_be_chosen(capsys: Any) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "rank" in found["optimizers"]["GaLoreAdamW"] and "sparsity" in found["parameterizations"]["sltrain"]
    assert found["models"]["llama_7b"]["hidden"] == 4096
    assert main(["list"]) == 0
    assert all(name in capsys.readouterr().out for name in found["configurations"][:1])


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_settings_that_come_with_the_package(name: str) -> None:
    by_name, by_path = (parse_options(["--config", given]) for given in (name, f"configs/{name}.yaml"))
    assert by_name.model == "llama_7b" and by_name.per_layer
    assert dataclasses.replace(by_path, config=name) == by_name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning-rate 1e-3", "did you mean --lr?"),
        ("--gradient-accumulation-steps 4", "did you mean --accumulate?"),
        ("--gradient_accumulation_steps=4", "did you mean --accumulate?"),
        ("--device cuda", "CUDA_VISIBLE_DEVICES"),
        ("--rank 128", "--optimizer-args rank=128"),
        ("--config nothing", "expected a file or one of llama_7b_12gb"),
        ("trian --model x", "Invalid command: 'trian', expected one of train, generate"),
        ("--foo", "--help lists the options"),
        ("--parameterization-args rank=4", "they need --parameterization"),
        ("--restart-args every=4", "without restarts: 'every'"),
        ("tokenize --data text --output-dir {tmp}/out", "did you mean --dataset?"),
        ("tokenize --dataset {text} --output-dir {text}/out", "Invalid output_dir: cannot write"),
        ("generate nowhere", "nowhere is no folder"),
        ("generate nowhere --max-tokens 3", "did you mean --tokens?"),
        ("evaluate {tmp}", "holds neither a model nor a complete checkpoint"),
        ("evaluate {tmp} --batch 3", "did you mean --batch-size?"),
        ("compare {tmp}", "is no run folder"),
        ("--model llama_9m --dataset {text} --init {tmp}", "expected a folder with config.json and weights"),
        ("--dataset {text} --init llama_9m", "a preset has no weights"),
        ("list --jsn", "did you mean --json?"),
    ],
)
def test_a_wrong_line_gets_one_line(line: str, message: str, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Document {i}."}) for i in range(40)))
    assert main(line.format(tmp=tmp_path, text=text).split()) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


def test_a_damaged_run_gets_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    state = damaged / "checkpoint-4" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "options": [1]}))
    (damaged / "config.yaml").write_text("model: x")
    for command, message in (
        ("generate", "Broken checkpoint"),
        ("compare", "config.yaml has no optimizer, expected the options of a run"),
    ):
        assert main([command, str(damaged)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    # Of numbers alone: the first row is none, the second has no loss that is finite.
    (damaged / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n{"step": 2, "loss": null}\n')
    assert main(["compare", str(damaged)]) == 2
    assert "has made no update with a finite loss" in capsys.readouterr().err


def test_a_run_without_finite_weights_has_a_report(run: Path, tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / "run"
    line = ["--model", str(run.parent / "config.json"), "--dataset", str(run.parent / "text.txt"), *LINE.split()[5:]]
    assert main([*line, "--output-dir", str(made), "--optimizer", "SGD", "--lr", "1e30", "--max-steps", "2"]) == 0
    assert "no sample of the model: probability tensor" in capsys.readouterr().out
    assert (made / "report.html").is_file()
    assert main(["generate", str(made)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "probability tensor" in error


def test_synonyms_lead_to_options_and_hide_none() -> None:
    names = {name.replace("_", "-") for name in FIELDS}
    assert set(SYNONYMS.values()) <= names
    assert not names & (SYNONYMS.keys() | ELSEWHERE.keys()) and not SYNONYMS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help(command: list[str], capsys: Any) -> None:
    assert main([*command, "--help"]) == 0
    assert "usage: lowrank-train" in capsys.readouterr().out


def test_a_chart_leaves_out_what_cannot_be_drawn() -> None:
    points = [(1, 1.0), (2, float("nan")), (3, 0.0), (4, 100.0)]
    assert len(re.findall(r'points="([^"]*)"', chart("c", [Series("s", points)], "x"))[0].split()) == 3
    logarithmic = chart("c", [Series("s", points)], "x", logarithmic=True)
    assert len(re.findall(r'points="([^"]*)"', logarithmic)[0].split()) == 2
    assert ">100</text>" in logarithmic
    assert chart("c", [Series("s", [])], "x") == ""
