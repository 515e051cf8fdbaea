"""Which runs ``benchmarks.converge`` makes and in which order, and which of them there are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.methods import (
    DOUBLE,
    GAP,
    HALF,
    LATE,
    MAIN,
    METHODS,
    OTHERS,
    PILOTS,
    QUARTER,
    RANK,
    REACH,
    REST_LR,
    Method,
)

PILOT_SEED = 0


class Suite(NamedTuple):
    """What is the same for all methods; ``pilot`` is the suite whose best rates are tried first."""

    name: str
    shape: Mapping[str, int]
    seq_len: int
    batch_size: int
    updates: int
    rank: int
    gap: int
    evaluated: int
    pilot: Suite | None = None

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch_size * self.updates

    def filled(self, args: Mapping[str, Any], rest: float) -> dict[str, Any]:
        """Arguments with the suite's values, and the rate ``rest``, in the places that stand for them."""
        known = {
            RANK: self.rank, DOUBLE: self.rank * 2, HALF: self.rank // 2, QUARTER: self.rank // 4,
            GAP: self.gap, LATE: self.updates * 4 // 5, REST_LR: rest,
        }  # fmt: skip
        return {key: known.get(value, value) if isinstance(value, str) else value for key, value in args.items()}


CPU = Suite(
    "cpu",
    {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 64,
    },
    seq_len=64,
    batch_size=16,
    updates=400,
    rank=16,
    gap=40,
    evaluated=32_768,
)
# Six times as long, about ten tokens a parameter.
LONG = CPU._replace(name="cpu-long", updates=2400, gap=200, evaluated=65_536, pilot=CPU)
# The longest first.
SUITES = {suite.name: suite for suite in (LONG, CPU)}


class Run(NamedTuple):
    """One method at one rate with one seed; ``rest`` is the rate of embeddings, head and vectors."""

    method: Method
    lr: float
    seed: int
    rest: float

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method.name, self.lr, self.seed

    @property
    def file(self) -> str:
        words = "".join(c if c.isalnum() else " " for c in self.method.name.lower()).split()
        return f"{'-'.join(words)}_lr{self.lr:.4g}_seed{self.seed}.json"


Results = Mapping[tuple[str, float, int], Mapping[str, Any]]


def config_of(suite: Suite, run: Run) -> dict[str, Any]:
    """All that decides the outcome of a run, beside versions and data; what a method does not set is left out."""
    unset = Method("", "")._asdict()
    fields = {key: value for key, value in run.method._asdict().items() if value != unset[key]}
    filled = {key: suite.filled(value, run.rest) if key.endswith("args") else value for key, value in fields.items()}
    method = {key: filled[key] for key in filled if key not in ("name", "start", "follows", "factor", "rest")}
    shared = {key: value for key, value in suite._asdict().items() if key != "pilot"}
    return {"suite": shared | {"rest": run.rest}, "method": method, "lr": run.lr, "seed": run.seed}


def digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def folder(suite: Suite) -> Path:
    return common.RESULTS / "converge" / suite.name


def results(suite: Suite) -> dict[tuple[str, float, int], dict[str, Any]]:
    """Every run of the suite as it is declared now, by method, rate and seed; the best pilot is a run of AdamW too."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder(suite).glob("*.json"))]
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    pilots = {method.name: method for method in PILOTS}
    # Those of the pilots first: which rate the others have follows from them.
    for row in sorted(rows, key=lambda row: row["method"] not in pilots):
        method = METHODS.get(row["method"])
        rest = method and (method.rest or rest_rate(found))
        if method and rest:
            run = Run(method, row["lr"], row["seed"], rest)
            if row["config_hash"] == digest(config_of(suite, run)):
                found[run.key] = row
    for name, lr, seed in [*found]:
        if name in pilots and pilots[name].rest == rest_rate(found):
            found.setdefault((MAIN[0].name, lr, seed), found[name, lr, seed])
    return found


def rest_rate(known: Results) -> float | None:
    """The rate of embeddings, head and vectors that was best for AdamW; None while one is to be tried."""
    tried = {method.rest: known.get((method.name, float(method.start or 0), PILOT_SEED)) for method in PILOTS}
    found = {rest: row["loss"] for rest, row in tried.items() if row}
    return min(found, key=found.__getitem__) if len(found) == len(PILOTS) else None


def losses(method: str, seed: int, known: Results) -> dict[float, float]:
    """Validation loss by rate."""
    return {lr: row["loss"] for (name, lr, of), row in known.items() if (name, of) == (method, seed)}


def best_rate(method: str, seed: int, known: Results) -> float | None:
    """The rate with the lowest loss so far."""
    found = losses(method, seed, known)
    return min(found, key=found.__getitem__) if found else None


def pilot_rates(suite: Suite) -> dict[str, float]:
    """The best rate of each method that has run in the suite's pilot, at its first seed."""
    known = results(suite.pilot) if suite.pilot else {}
    found = {name: best_rate(name, PILOT_SEED, known) for name in METHODS}
    return {name: rate for name, rate in found.items() if rate is not None}


def first_rate(method: Method, seed: int, known: Results, pilot: Mapping[str, float]) -> float | None:
    """What a method tries first; None while the one that it follows has no settled rate."""
    if method.name in pilot or method.start is not None:
        return pilot.get(method.name, method.start)
    leader = METHODS[str(method.follows)]
    rate = best_rate(leader.name, seed, known)
    return None if rate is None or ladder(leader, seed, known, pilot) else rate * method.factor


def ladder(method: Method, seed: int, known: Results, pilot: Mapping[str, float]) -> list[float]:
    """The rates that are still to try; none left means that the best so far is the best of its neighbours."""
    first = first_rate(method, seed, known, pilot)
    if first is None:
        return []
    found = losses(method.name, seed, known)
    if first not in found:
        return [first]
    at = round(math.log2(min(found, key=found.__getitem__) / first))
    rates = [first * 2.0**k for k in range(-REACH, REACH + 1)]
    near = rates[max(at + REACH - 1, 0) : at + REACH + 2]
    return [rate for rate in near if rate not in found]


def pending(
    seeds: Sequence[int], known: Results, wanted: Sequence[str] = (), pilot: Mapping[str, float] = {}
) -> list[Run]:
    """What to run next, the most important first; ``pilot`` has the rates of :func:`pilot_rates`."""
    pilots = [
        Run(method, float(method.start or 0), PILOT_SEED, float(method.rest or 0))
        for method in PILOTS
        if not losses(method.name, PILOT_SEED, known)
    ]
    rest = rest_rate(known)
    if rest is None:
        return pilots
    seed = seeds[0]
    main, others = ([method for method in methods if not wanted or method.name in wanted] for methods in (MAIN, OTHERS))

    def climb(methods: Sequence[Method], new: bool) -> list[Run]:
        chosen = [method for method in methods if new != bool(losses(method.name, seed, known))]
        # Those with the fewest runs first.
        chosen.sort(key=lambda method: len(losses(method.name, seed, known)))
        return [Run(method, lr, seed, rest) for method in chosen for lr in ladder(method, seed, known, pilot)]

    def repeat(methods: Sequence[Method]) -> list[Run]:
        settled = [method for method in methods if not ladder(method, seed, known, pilot)]
        best = [(method, best_rate(method.name, seed, known)) for method in settled]
        return [Run(method, lr, more, rest) for more in seeds[1:] for method, lr in best if lr is not None]

    # Every method once before any of them again.
    runs = [*climb([*main, *others], True), *climb(main, False), *repeat(main), *climb(others, False), *repeat(others)]
    return [run for run in runs if run.key not in known]
