"""What a run survives: signals at any moment, divergence, a second run, its reports; and what ``verify`` says."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import train_llama
from lowrank_optim.pretrain import checkpoint, launch, report, steps, trainer
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.divergence import LEAST, PATIENCE, Guard
from lowrank_optim.pretrain.metrics import read_metrics
from lowrank_optim.pretrain.update import Updater
from tests.pretrain.logs import rows


@pytest.fixture
def line(tiny_model: Path, shards: Path, tmp_path: Path) -> list[str]:
    """Six updates of two micro-batches in ``tmp_path / "run"``."""
    return (
        f"--model {tiny_model} --dataset {shards} --optimizer-args rank=4 update_proj_gap=3 --lr 0.02 --seq-len 24"
        " --batch-size 5 --accumulate 2 --max-steps 6 --save-every 2 --keep 0 --eval-every 3 --eval-batches 2"
        f" --sample-tokens 0 --resume auto --output-dir {tmp_path / 'run'}"
    ).split()


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.split("-")[-1]) for path in checkpoint.checkpoints(folder)]


def every(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Any) -> None:
    """Have ``act(call)`` done before every call of a function, ``call`` counting from 1."""
    whole, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        act(calls[0])
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def kill(number: int, at: int) -> Any:
    return lambda call: os.kill(os.getpid(), number) if call == at else None


@pytest.mark.parametrize(
    ("number", "where", "at", "more", "saved"),
    [
        # The first micro-batch of the fourth update, the second of the fifth, and the only one.
        (signal.SIGUSR1, "_backward", 7, [], 3),
        pytest.param(signal.SIGHUP, "_backward", 9, ["--per-layer"], 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "_backward", 4, ["--accumulate", "1", "--per-layer"], 4, marks=pytest.mark.slow),
        # Within the evaluation after the third update, which is made up for.
        (signal.SIGINT, "loss_sum", 2 + 6 + 1, [], 3),
        # Within the evaluation before the first.
        pytest.param(signal.SIGTERM, "loss_sum", 1, [], 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_within_a_micro_batch(
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    number: int,
    where: str,
    at: int,
    more: list[str],
    saved: int,
) -> None:
    whole, line = tmp_path / "whole", [*line, *more]
    assert train_llama.main([*line, "--output-dir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        every(patch, Updater if where == "_backward" else steps, where, kill(number, at))
        assert train_llama.main(line) == 128 + number
    assert f"stopped by {signal.Signals(number).name} after {saved} updates" in capfd.readouterr().out
    assert steps_of(tmp_path / "run")[-1:] == ([saved] if saved else [])
    assert train_llama.main(line) == 0
    assert rows(tmp_path / "run") == rows(whole)
    assert len({(path / "checkpoint-6" / "model.safetensors").read_bytes() for path in (whole, tmp_path / "run")}) == 1


def test_a_second_interrupt_leaves_the_last_checkpoint(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with monkeypatch.context() as patch:
        every(patch, Updater, "_backward", kill(signal.SIGINT, 7))
        # Within the write of the checkpoint that the first one asks for: after that of the second update.
        every(patch, checkpoint, "save_weights", kill(signal.SIGINT, 2))
        assert train_llama.main(line) == 128 + signal.SIGINT
    assert "interrupted; saved checkpoints are intact" in capfd.readouterr().err
    assert steps_of(tmp_path / "run") == [2]
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = launch.Stop(0.0, None)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_due()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_is_up_before_a_save_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    stop = launch.Stop(100.0, 1.0)
    # Half a minute at 100 MB/s, and half as much again for safety.
    stop.expect(2_000_000_000)
    assert not stop.is_due()
    now[0] += 10
    assert not stop.is_due()
    now[0] += 10
    # The next look would come after 10 seconds again, at 130, and the save would end at 160, when time is up.
    assert not stop.is_due()
    now[0] += 2
    assert stop.is_due()
    with stop.saving():
        now[0] += 2
    assert stop.save_seconds == 2 and not stop.is_due()
    assert not launch.Stop(0.0, None).is_due()


def test_max_time_saves(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    # Repeated, it would never end.
    assert train_llama.main([*line, "--max-time", "0"]) == 2
    assert "Invalid --max-time: 0 minutes, over before the first update" in capfd.readouterr().err
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(launch.Stop, "is_late", lambda self, now: next(calls) > 10)
        assert train_llama.main([*line, "--max-time", "1000"]) == 75
    assert steps_of(tmp_path / "run")[-1] == 3


def spoil(patch: pytest.MonkeyPatch, first: int, last: int, factor: float) -> None:
    """Multiply the losses of some updates."""
    whole, calls = Updater._accumulate, iter(range(1, 10**6))

    def spoilt(self: Updater, *args: Any) -> float:
        return whole(self, *args) * (factor if first <= next(calls) <= last else 1.0)

    patch.setattr(Updater, "_accumulate", spoilt)


def test_a_divergence_goes_back_once(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = tmp_path / "run"
    line = [*line, "--max-steps", "18", "--eval-every", "0", "--keep", "1"]
    with monkeypatch.context() as patch:
        spoil(patch, 6, 5 + PATIENCE, float("nan"))
        assert train_llama.main(line) == 0
    out = capfd.readouterr().out
    assert f"back to {run / 'checkpoint-4'}; the data of updates 5 to 15 are left out from now on" in out
    # No checkpoint while it lasted, and none of the last good one's followers took its place.
    assert "checkpoint-6" not in out.split("back to")[0] and "checkpoint-6" in out.split("back to")[1]
    logged = [row for row in rows(run) if "eval_loss" not in row]
    assert [row["step"] for row in logged if "rollbacks" not in row] == list(range(1, 16))
    first, *later = [row for row in logged if "rollbacks" in row]
    assert first == {"step": 4, "rolled_back_from": 15, "rollbacks": 1}
    assert [row["step"] for row in later] == list(range(5, 19)) and all(row["loss"] for row in later)
    # A second time it stops, with the last good checkpoint in place.
    with monkeypatch.context() as patch:
        spoil(patch, 3, 10**6, float("inf"))
        assert train_llama.main([*line, "--max-steps", "40"]) == 2
    err = capfd.readouterr().err
    assert f"since a rollback; {run / 'checkpoint-20'} is the last good checkpoint: lower --lr" in err
    assert steps_of(run) == [20]


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_may_diverge(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, line = tmp_path / "run", [*line, "--max-steps", "14", "--keep", "1"]
    with monkeypatch.context() as patch:
        spoil(patch, 3, 10**6, float("nan"))
        every(patch, Updater, "_backward", kill(signal.SIGTERM, 9))
        assert train_llama.main(line) == 128 + signal.SIGTERM
    # Saved, for nothing is to be lost, beside the good one that it must not push out.
    assert steps_of(run) == [2, 4] and checkpoint.last_good(run) == [run / "checkpoint-2"]
    with monkeypatch.context() as patch:
        # Eight more make ten.
        spoil(patch, 1, 8, float("nan"))
        assert train_llama.main(line) == 0
    assert next(row for row in rows(run) if "rolled_back_from" in row) == {
        "step": 2,
        "rolled_back_from": 12,
        "rollbacks": 1,
    }
    assert (run / "checkpoint-4.diverged").is_dir() and steps_of(run) == [14]


def test_what_counts_as_a_divergence() -> None:
    guard = Guard()
    for _ in range(LEAST - 1):
        assert not guard.sees(1.0, made=True, factor=2.0)
    # Too early to know.
    assert not guard.sees(9.0, made=True, factor=2.0) and guard.suspect == 0
    # Noise, and a loss that is no longer what it was, are none.
    assert not any(guard.sees(loss, made=True, factor=2.0) for loss in [1.9, 2.1, 1.0] * 20)
    assert guard.suspect == 0 and max(guard.losses[-40:]) < 2.0
    assert not any(guard.sees(2.1, made=True, factor=0) for _ in range(PATIENCE))
    guard = dataclasses.replace(guard, losses=[1.0] * LEAST)
    found = [guard.sees(2.1, made=True, factor=2.0) for _ in range(PATIENCE)]
    assert found == [False] * (PATIENCE - 1) + [True] and guard.losses == [1.0] * LEAST
    assert [Guard(suspect=PATIENCE - 1).sees(1.0, made=made, factor=0) for made in (True, False)] == [False, True]


def test_one_run_owns_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with launch.own(folder), pytest.raises(UserError, match="another run is writing"), launch.own(folder):
        pass
    # Nothing came of it.
    assert not folder.exists()
    (folder / ".tmp-checkpoint-4-0123abcd").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "checkpoint-4").mkdir()
    with launch.own(folder):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "checkpoint-4"]
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Invalid output_dir: cannot write"), launch.own(tmp_path / "file" / "run"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def refuse(self: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    # Perhaps those of another run.
    left = tmp_path / "run" / ".tmp-checkpoint-4-0123abcd"
    left.mkdir(parents=True)
    monkeypatch.setattr(FileLock, "acquire", refuse)
    with launch.own(tmp_path / "run"):
        assert left.is_dir()
    assert capfd.readouterr().err.startswith("warning: nothing keeps a second run out of")


def test_the_newest_whole_checkpoint(line: list[str], tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert train_llama.main(line) == 0
    whole = rows(run)
    capfd.readouterr()
    assert train_llama.main(["verify", str(run)]) == 0
    assert capfd.readouterr().out.count(": whole, ") == 3
    shutil.rmtree(run / "checkpoint-6")
    content = bytearray((run / "checkpoint-4" / "optimizer.pt").read_bytes())
    content[-100] ^= 1
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(content)
    # An interrupted copy.
    (run / "checkpoint-5").mkdir()
    assert train_llama.main(["verify", str(run)]) == 1
    found = capfd.readouterr().out.splitlines()
    for text, said in zip(
        found, (r"whole, \d+ files", "BROKEN, optimizer.pt", "BROKEN, state.json cannot be read"), strict=True
    ):
        assert re.search(f": {said}", text)
    assert train_llama.main(["verify", str(run / "checkpoint-4")]) == 1
    assert train_llama.main(["verify", str(tmp_path)]) == 2
    assert train_llama.main(["verify"]) == 2
    capfd.readouterr()
    assert train_llama.main(line) == 0
    out = capfd.readouterr().out
    assert f"passed over {run / 'checkpoint-4'}: optimizer.pt is not what was written" in out
    assert f"resumed    {run / 'checkpoint-2'} after 2 updates" in out
    assert rows(run) == whole
    assert sorted(path.name for path in run.glob("checkpoint-*.*")) == ["checkpoint-4.broken", "checkpoint-5.broken"]


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_changes(line: list[str], tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    assert train_llama.main(line) == 0
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    before = sorted(path for path in run.rglob("*"))
    assert train_llama.main(line) == 2
    err = capfd.readouterr().err
    assert err.count("model.safetensors is missing") == 3 and "Traceback" not in err
    assert sorted(path for path in run.rglob("*")) == before


@pytest.mark.slow
def test_digests_can_be_left_out(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_llama.main([*line, "--max-steps", "2"]) == 0
    (tmp_path / "run" / "checkpoint-2" / "generation_config.json").write_text("{}")
    more = [*line, "--max-steps", "3"]
    assert train_llama.main(more) == 2
    assert train_llama.main([*more, "--no-verify"]) == 0


def test_data_that_fail_are_saved_before(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    load = trainer.load_data

    def broken(*args: Any, **kwargs: Any) -> Any:
        text = load(*args, **kwargs)

        def train(state: Any) -> Iterator[Any]:
            for number, item in enumerate(text.train(state)):
                if number == 7:
                    raise UserError("Broken shard: line 9")
                yield item

        return dataclasses.replace(text, train=train)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "load_data", broken)
        assert train_llama.main(line) == 2
    assert capfd.readouterr().err.rstrip().endswith("error: Broken shard: line 9")
    assert steps_of(tmp_path / "run") == [2, 3]


def test_reports_that_fail_do_not_end_a_run(
    line: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    class Full:
        def log(self, *_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

    start = trainer.start_accelerator

    def reporting(*args: Any) -> Any:
        accelerator = start(*args)
        monkeypatch.setattr(accelerator, "log", Full().log)
        return accelerator

    monkeypatch.setattr(trainer, "start_accelerator", reporting)
    assert train_llama.main([*line, "--max-steps", "2"]) == 0
    assert capfd.readouterr().out.count("warning: no more reports to") == 1
    assert len(rows(tmp_path / "run")) == 4


def test_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Gone:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, _: str) -> int:
            raise OSError("Input/output error")

        def fileno(self) -> int:
            return int(self.file.fileno())

        def flush(self) -> None:
            pass

    with (tmp_path / "terminal").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Gone(file))
        report.write("saved")
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))


@pytest.mark.parametrize("row", ['{"loss": 1}', "[" * 100_000, "7", '{"step": "two"}'])
def test_rows_that_are_none(line: list[str], tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + row + "\n")
    assert read_metrics(path) == [{"step": 1}]


def test_state_json_of_another_kind(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for text in ("[" * 100_000, "[]", "{}", '{"format": 1, "progress": {"step": []}}', '{"format": 2}', "7"):
        (folder / "state.json").write_text(text)
        assert "state.json is not what was written" in str(checkpoint.damage(folder)) or "missing" in str(
            checkpoint.damage(folder)
        )
    (folder / "state.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(UserError, match="its format is 3, expected at most 2"):
        checkpoint.damage(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_large_files_are_compared_beside_the_load(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, name: str
) -> None:
    run = tmp_path / "run"
    assert train_llama.main(line) == 0
    whole = rows(run)
    for step in (4, 6):
        content = bytearray((run / f"checkpoint-{step}" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / f"checkpoint-{step}" / name).write_bytes(content)
    monkeypatch.setattr(trainer, "READ_BEFORE", 100)
    capfd.readouterr()
    assert train_llama.main(line) == 0
    out = capfd.readouterr().out
    assert out.count(f"{name} is not what was written (its digest differs)") == 2
    assert f"resumed    {run / 'checkpoint-2'} after 2 updates" in out and rows(run) == whole
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / name).write_bytes(content)
    assert train_llama.main(line) == 2
    assert "Broken checkpoint" in capfd.readouterr().err
