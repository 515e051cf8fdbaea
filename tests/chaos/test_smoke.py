"""One fault of every kind; ``python -m tests.chaos`` has them all and prints the table."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.__main__ import BASE, bad, faults
from tests.chaos.faults import Bench, Outcome, flip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Bench(tmp_path)
    yield made
    made.server.close()


def check(outcome: Outcome) -> None:
    assert not bad(outcome), outcome


def test_one_fault_of_every_kind(bench: Bench) -> None:
    rng = random.Random(0)
    for outcome in bench.killed(BASE, rng):
        check(outcome)
    check(bench.stopped(BASE, signal.SIGTERM, rng))
    check(bench.refused(BASE, errno.ENOSPC, rng))
    check(bench.locked(BASE))
    check(bench.damaged(BASE, "bit flipped", lambda new, old: flip(new / "optimizer.pt", 1000, rng), continued=True))


@pytest.mark.slow
def test_every_fault(bench: Bench) -> None:
    for number, part in enumerate(faults(quick=False)):
        for outcome in part(bench, random.Random(number)):
            check(outcome)
