"""Every fault over every optimizer: ``python -m tests.chaos [--quick] [--seed N]`` prints what became of them.

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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lowrank_optim.pretrain.report import table
from tests.chaos.faults import ERRORS, STOPS, Bench, Outcome, damages

BASE = "GaLoreAdamW-dense"
# Whose checkpoints have other files or other states than those of BASE.
OTHERS = ("GaLoreAdamW8bit-int8", "FiraAdamW-sltrain", "QGaLoreAdamW8bit-per_layer")


def outcomes(bench: Bench, rng: random.Random, *, quick: bool) -> Iterator[Outcome]:
    """All faults; ``quick``: one of every kind."""
    bench.combinations["foreign"] = [*bench.combinations[BASE], "--seed", "1"]
    foreign = bench.reference("foreign") / "checkpoint-4"
    for combination in (BASE,) if quick else (BASE, *OTHERS):
        folder = bench.reference(combination) / "checkpoint-4"
        of_another = foreign if combination == BASE else bench.reference(combination) / "checkpoint-6"
        continued: set[str] = set()
        for kind, damage in damages(folder, of_another, rng, regions=1 if quick else 12):
            yield bench.damaged(combination, kind, damage, continued=combination == BASE and kind not in continued)
            continued.add(kind)
    yield bench.locked(BASE)
    for _ in range(1 if quick else 4):
        for number in STOPS[:1] if quick else STOPS:
            yield bench.stopped(BASE, number, rng)
        yield bench.stopped(BASE, STOPS[1], rng, twice=True)
        for code in ERRORS[:1] if quick else ERRORS:
            yield bench.refused(BASE, code, rng)
        yield bench.limited(BASE, rng.choice((0, 100, 1000, 20_000, 40_000)))
        yield bench.removed(BASE, "remove", rng)
        yield bench.removed(BASE, "replace", rng)
    for combination in [BASE] if quick else list(filter(bench.fits, bench.combinations)):
        yield from bench.killed(combination, rng)
        if not quick:
            yield bench.stopped(combination, rng.choice(STOPS), rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, list[Outcome]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        # Interrupted or terminated, it prints the table so far.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        whole = False
        with suppress(KeyboardInterrupt):
            for outcome in outcomes(bench, random.Random(given.seed), quick=given.quick):
                found[outcome.kind].append(outcome)
                if bad(outcome):
                    print(outcome._replace(told=outcome.told[-500:]), file=sys.stderr, flush=True)
            whole = True
        bench.server.close()
    found["all"] = [outcome for several in found.values() for outcome in several]
    body = [
        (
            kind,
            len(several),
            sum(outcome.noticed for outcome in several),
            sum(outcome.lost for outcome in several),
            f"{sum(o.identical is True for o in several)} of {sum(o.identical is not None for o in several)}",
        )
        for kind, several in found.items()
    ]
    print(table([("fault", "tries", "noticed or harmless", "lost updates", "identical continuation"), *body]))
    return int(not whole or any(map(bad, found["all"])))


def bad(outcome: Outcome) -> bool:
    return not outcome.noticed or outcome.lost != 0 or outcome.identical is False


if __name__ == "__main__":
    sys.exit(main())
