"""What a resumed run may change, and what a checkpoint is refused for."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_optim.pretrain import checkpoint
from lowrank_optim.pretrain.config import Options, Resolved, UserError
from lowrank_optim.pretrain.random_state import random_state, set_random_state

# How long a run is, what it reports, saves and costs in memory. All other options shape what it trains.
MAY_CHANGE = {
    *("checkpointing", "checkpoint_every", "chunked_loss", "compile", "warmup_steps", "max_steps"),
    *("eval_every", "eval_batches", "legacy_eval", "save_every", "keep", "output_dir", "resume", "log_every"),
    *("report_to", "sample_prompt", "sample_tokens", "config", "dry_run", "max_bad_documents", "allow_changed_data"),
    *("verify", "max_time", "loss_limit", "fsdp", "process_timeout", "graph_step"),
}
NAMES = [field.name for field in dataclasses.fields(Options)]


def options(**changes: Any) -> Resolved:
    numbers = dict.fromkeys(("seq_len", "warmup_steps", "max_steps", "batch_size", "accumulate", "eval_every"), 1)
    rest = {"grad_clip": 1.0, "eval_batches": 1, "save_every": 1, "restarts": "none"}
    return Resolved(**{**dataclasses.asdict(Options()), **numbers, **rest, **changes})


def write(path: Path, **changes: Any) -> Path:
    """A state.json of ``options()``; a change to None leaves the entry out."""
    state = {
        "format": checkpoint.FORMAT,
        "progress": {"step": 7, "tokens": 70, "untrained_loss": 2.5},
        "fingerprint": "f",
        "processes": 2,
        "options": dataclasses.asdict(options()),
        **changes,
    }
    kept = {key: value for key, value in state.items() if value is not None}
    (path / "state.json").write_text(json.dumps(kept), encoding="utf-8")
    return path


def another(value: Any) -> Any:
    return (not value) if isinstance(value, bool) else [*value, "x"] if isinstance(value, list) else f"{value}x"


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_shapes_the_run_stays(name: str, tmp_path: Path) -> None:
    changed = another(getattr(options(), name))
    now = options(**{name: changed})
    write(tmp_path)
    if name in MAY_CHANGE:
        assert checkpoint.read_state(tmp_path, now, processes=2) == checkpoint.Progress(7, 70, 2.5)
    else:
        with pytest.raises(UserError, match=rf"Cannot resume .*\b{name} was .* and is now "):
            checkpoint.read_state(tmp_path, now, processes=2)


def test_another_number_of_processes_shares_the_sequences_of_an_update(tmp_path: Path) -> None:
    saved = dataclasses.asdict(options(batch_size=2, accumulate=3))
    write(tmp_path, options=saved)
    # 2 processes of 3 micro-batches of 2.
    for processes, size, expected in ((1, 2, 6), (1, 3, 4), (3, 2, 2), (6, 2, 1), (4, 1, 3), (2, 2, 9)):
        now = options(batch_size=size, accumulate=9)
        assert checkpoint.accumulation(tmp_path, now, processes=processes) == expected
    checkpoint.read_state(tmp_path, options(batch_size=4, accumulate=1), processes=3)
    with pytest.raises(UserError, match="accumulate was 3 and is now 1"):
        checkpoint.read_state(tmp_path, options(batch_size=2, accumulate=1), processes=2)
    with pytest.raises(
        UserError, match=r"12 sequences, which 4 processes with 2 each cannot share; use --batch-size 1 or 3"
    ):
        checkpoint.accumulation(tmp_path, options(batch_size=2), processes=4)
    with pytest.raises(UserError, match="5 processes with 2 each cannot share; use another number of processes"):
        checkpoint.accumulation(tmp_path, options(batch_size=2), processes=5)
    with pytest.raises(UserError, match=r"with --per-layer .* and 3 would become 1"):
        checkpoint.accumulation(tmp_path, options(batch_size=2, per_layer=True), processes=6)


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its format is 99, expected"):
        checkpoint.read_state(write(tmp_path, format=99), options(), processes=2)


@pytest.mark.parametrize("missing", ["format", "progress", "processes", "options"])
def test_a_broken_state_is_a_broken_checkpoint(missing: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Broken checkpoint: .*state\.json"):
        checkpoint.read_state(write(tmp_path, **{missing: None}), options(), processes=2)
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"Broken checkpoint: .*state\.json"):
        checkpoint.read_state(tmp_path, options(), processes=2)


def test_what_a_checkpoint_says_of_its_data(tmp_path: Path) -> None:
    assert checkpoint.read_fingerprint(write(tmp_path, fingerprint={"files": {}})) == {"files": {}}
    with pytest.raises(UserError, match=r"Broken checkpoint: .*state\.json"):
        checkpoint.read_fingerprint(write(tmp_path, fingerprint=None))


def test_an_option_that_an_older_version_did_not_know_has_its_default(tmp_path: Path) -> None:
    saved = dataclasses.asdict(options())
    del saved["seed"]
    write(tmp_path, options=saved)
    checkpoint.read_state(tmp_path, options(), processes=2)
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        checkpoint.read_state(tmp_path, options(seed=1), processes=2)


def folder(at: Path, *steps: int) -> Path:
    for step in steps:
        (at / f"checkpoint-{step}").mkdir(parents=True)
        (at / f"checkpoint-{step}" / "state.json").touch()
    return at


def test_where_a_run_resumes(tmp_path: Path) -> None:
    run, other = folder(tmp_path / "run", 9, 10), folder(tmp_path / "other", 10, 11)
    # Not complete, and no checkpoint of ours.
    (run / "checkpoint-99").mkdir()
    (run / "checkpoint-last").mkdir()
    assert [p.name for p in checkpoint.checkpoints(run)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoint.find("auto", run) == [run / "checkpoint-10", run / "checkpoint-9"]
    for nowhere in (None, tmp_path / "new"):
        assert not checkpoint.find("auto", nowhere) and not checkpoint.find(None, nowhere)
    assert checkpoint.find(str(run), run) == [run / "checkpoint-10"]
    assert checkpoint.find(str(other / "checkpoint-10"), run) == [other / "checkpoint-10"]
    assert checkpoint.find(str(other), None) == [other / "checkpoint-11"]
    with pytest.raises(UserError, match="holds a run already"):
        checkpoint.find(None, run)
    with pytest.raises(UserError, match="is no checkpoint and holds none"):
        checkpoint.find(str(tmp_path), None)
    with pytest.raises(UserError, match="checkpoint-10 is newer than"):
        checkpoint.find(str(run / "checkpoint-9"), run)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_come_back(tmp_path: Path) -> None:
    # An odd number of Gaussians leaves one behind in Python's and in numpy's generator.
    random.gauss(0, 1)
    np.random.randn()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = (drawn(), random.gauss(0, 1), float(np.random.randn()))
    drawn()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (drawn(), random.gauss(0, 1), float(np.random.randn())) == expected
