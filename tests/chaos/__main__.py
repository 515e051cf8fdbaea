"""Every fault over every optimizer: ``python -m tests.chaos [--quick] [--seed N]`` prints what became of them.

Without ``--quick`` the table is written to ``benchmarks/results/chaos.json``, from which docs/reliability.md has it; an
interrupted one says how many of its parts are done.
Status 1 where one went unnoticed, an update was lost that had been saved, a continuation ended elsewhere, or it was
interrupted.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.common import write_result
from lowrank_optim.pretrain.report import table
from tests.chaos.faults import ERRORS, STOPS, Bench, Outcome, combinations, damages

BASE = "GaLoreAdamW-dense"
# Whose checkpoints have other files or other states than those of BASE.
OTHERS = ("GaLoreAdamW8bit-int8", "FiraAdamW-sltrain", "QGaLoreAdamW8bit-per_layer")
HEADER = ("fault", "tries", "noticed or harmless", "lost updates", "identical continuation")
Faults = Callable[[Bench, random.Random], Iterator[Outcome]]


def faults(*, quick: bool) -> list[Faults]:
    """All faults, in parts that need nothing of each other; ``quick``: one of every kind."""
    if quick:
        return [partial(damaged, BASE, regions=1), partial(surroundings, times=1), partial(killed, BASE, stop=False)]
    return [
        *(partial(damaged, combination, regions=12) for combination in (BASE, *OTHERS)),
        *[partial(surroundings, times=None)] * 4,
        *(partial(killed, combination, stop=True) for combination in combinations()),
    ]


def damaged(combination: str, bench: Bench, rng: random.Random, *, regions: int) -> Iterator[Outcome]:
    """Every kind of damage to every file of a checkpoint."""
    folder = bench.reference(combination) / "checkpoint-4"
    bench.combinations["foreign"] = [*bench.combinations[BASE], "--seed", "1"]
    foreign = bench.reference("foreign" if combination == BASE else combination)
    of_another = foreign / ("checkpoint-4" if combination == BASE else "checkpoint-6")
    continued: set[str] = set()
    for kind, damage in damages(folder, of_another, rng, regions=regions):
        yield bench.damaged(combination, kind, damage, continued=combination == BASE and kind not in continued)
        continued.add(kind)


def surroundings(bench: Bench, rng: random.Random, *, times: int | None) -> Iterator[Outcome]:
    """Signals, the disk and the folder, of ``times`` signals and errors or of all."""
    yield bench.locked(BASE)
    for number in STOPS[:times]:
        yield bench.stopped(BASE, number, rng)
    yield bench.stopped(BASE, STOPS[1], rng, twice=True)
    for code in ERRORS[:times]:
        yield bench.refused(BASE, code, rng)
    yield bench.limited(BASE, rng.choice((0, 100, 1000, 20_000, 40_000)))
    yield bench.removed(BASE, "remove", rng)
    yield bench.removed(BASE, "replace", rng)


def killed(combination: str, bench: Bench, rng: random.Random, *, stop: bool) -> Iterator[Outcome]:
    """SIGKILL and, with ``stop``, a signal that the run saves at; nothing where the optimizer has no such mode."""
    if bench.fits(combination):
        yield from bench.killed(combination, rng)
        if stop:
            yield bench.stopped(combination, rng.choice(STOPS), rng)


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """What became of the faults of each kind."""
    found: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.kind].append(outcome)
    return [
        {
            "fault": kind,
            "tries": len(several),
            "noticed": sum(outcome.noticed for outcome in several),
            "lost": sum(outcome.lost for outcome in several),
            "identical": sum(outcome.identical is True for outcome in several),
            "continued": sum(outcome.identical is not None for outcome in several),
        }
        for kind, several in found.items()
    ]


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row as tables have it."""
    return row["fault"], row["tries"], row["noticed"], row["lost"], f"{row['identical']} of {row['continued']}"


def bad(outcome: Outcome) -> bool:
    return not outcome.noticed or outcome.lost != 0 or outcome.identical is False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--quick", action="store_true", help="one fault of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs go on beside each other")
    given = parser.parse_args()
    todo = faults(quick=given.quick)
    benches: SimpleQueue[Bench] = SimpleQueue()

    def tries(number: int) -> list[Outcome]:
        bench = benches.get()
        found = []
        for outcome in todo[number](bench, random.Random(f"{given.seed} {number}")):
            found.append(outcome)
            if bad(outcome):
                print(outcome._replace(told=outcome.told[-500:]), file=sys.stderr, flush=True)
        benches.put(bench)
        print(f"{number + 1} of {len(todo)}", file=sys.stderr, flush=True)
        return found

    # Terminated, it ends as if interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes: list[Outcome] = []
    done = 0
    with ExitStack() as stack:
        without: dict[str, str] = {}
        for _ in range(given.jobs):
            bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), without)
            stack.callback(bench.server.close)
            benches.put(bench)
        pool = ThreadPoolExecutor(given.jobs)
        stack.callback(pool.shutdown, cancel_futures=True)
        with suppress(KeyboardInterrupt):
            for found in pool.map(tries, range(len(todo))):
                outcomes += found
                done += 1
    for combination, reason in without.items():
        print(f"without {combination}: {reason}")
    body = rows(outcomes) + rows([outcome._replace(kind="all") for outcome in outcomes])
    print(table([HEADER, *map(cells, body)]))
    if not given.quick:
        figures = {"done": done, "parts": len(todo), "rows": body, "without": without}
        print(write_result("chaos", torch.device("cpu"), figures))
    return int(done < len(todo) or any(map(bad, outcomes)))


if __name__ == "__main__":
    sys.exit(main())
