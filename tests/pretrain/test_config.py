from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lowrank_optim.pretrain.command_line import parse_options, write_options
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.recipes import resolve


def test_line_overrides_yaml_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max-steps: 7\nlr: 1e-3\nseed: 5\noptimizer_args: {rank: 8, betas: [0.9, 0.95]}\npack: true\n")
    options = parse_options(["--config", str(file), "--seed", "6", "--no-pack"])
    assert (options.max_steps, options.lr, options.seed, options.pack) == (7, 1e-3, 6, False)
    assert options.optimizer_args == ["rank=8", "betas=[0.9, 0.95]"]
    assert options.model == Options().model


def test_resolved_options_read_back(tmp_path: Path) -> None:
    options = resolve(parse_options(["--seed", "3"]), hidden_size=256, processes=1)
    write_options(options, tmp_path / "config.yaml")
    again = resolve(parse_options(["--config", str(tmp_path / "config.yaml")]), hidden_size=256, processes=1)
    assert dataclasses.replace(again, config=None) == options


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--optimzer", "AdamW"], "did you mean --optimizer"),
        (["--optim", "AdamW"], "did you mean --optimizer"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--lr", "nan"], "Invalid lr: nan"),
        (["--max-steps", "0"], "Invalid max_steps: 0, expected a positive number"),
        (["--keep", "-1"], "Invalid keep: -1"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
    ],
)
def test_bad_lines(line: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_options(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", "max_step; did you mean max_steps"),
        ("max_steps: soon", "Invalid max_steps .*'soon', expected int"),
        ("pack: 1", "Invalid pack"),
        ("dtype: fp8", "Invalid dtype"),
        ("config: other.yaml", "Invalid key"),
        ("- a", "not a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_options(["--config", str(tmp_path / "run.yaml")])


def test_published_values() -> None:
    run = resolve(Options(model="llama_1b"), hidden_size=2048, processes=8)
    assert (run.lr, run.max_steps, run.warmup_steps, run.seq_len) == (0.01, 100_000, 10_000, 256)
    assert run.batch_size * run.accumulate * 8 == 512
    assert set(run.optimizer_args) == {"rank=512", "update_proj_gap=200", "scale=0.25"}
    seven = resolve(Options(model="llama_7b", optimizer_args=["rank=256"]), hidden_size=4096, processes=8)
    assert (seven.lr, seven.grad_clip, seven.max_steps) == (0.005, 1.0, 150_000)
    assert set(seven.optimizer_args) == {"rank=256", "update_proj_gap=500", "scale=0.25"}


def test_a_given_batch_size_is_obeyed() -> None:
    assert resolve(Options(model="llama_60m", batch_size=8), hidden_size=512, processes=1).accumulate == 1


@pytest.mark.parametrize(
    ("model", "optimizer", "lr", "args"),
    [
        ("llama_60m", "RACS", 0.02, set()),
        ("llama_1b", "RACS", 0.02, {"scale=0.02", "adamw_lr=0.0007"}),
        ("llama_130m", "SCALE", 1e-3, {"adamw_lr=0.02"}),
        ("llama_7b", "SCALE", 1e-4, {"adamw_lr=0.001"}),
        ("llama_350m", "Alice", 0.02, {"rank=256"}),
        ("llama_1b", "Alice", 0.02, {"rank=512", "leading=160", "scale=0.25", "compensation=0.2", "adamw_lr=0.0007"}),
        ("llama_60m", "GoLoreAdamW", 1e-3, {"rank=128", "random_from=8000"}),
        ("llama_130m", "LoRAPre", None, {"rank=256"}),
        ("llama_60m", "FOAM", 0.01, set()),
        ("llama_60m", "SinkGD", None, set()),
        ("llama_60m", "Muon", None, set()),
    ],
)
def test_published_values_of_other_methods(model: str, optimizer: str, lr: float | None, args: set[str]) -> None:
    run = resolve(Options(model=model, optimizer=optimizer), hidden_size=512, processes=1)
    assert (run.lr, set(run.optimizer_args)) == (lr, args)
    given = resolve(
        Options(model=model, optimizer=optimizer, lr=0.5, optimizer_args=["eps=1e-3"]), hidden_size=512, processes=1
    )
    assert (given.lr, set(given.optimizer_args)) == (0.5, {"eps=1e-3", *args})
