"""The tables and plots of ``benchmarks.converge`` from the runs that exist; ``python -m benchmarks.table`` writes them.

docs/choosing.md has all methods, README some of them. What compares methods takes the longest suite in which they all
have run. The plots carry a digest of what they show, by which ``--check`` tells whether they are up to date.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import markdown
from benchmarks.converge import DIVERGED
from benchmarks.converge_runs import (
    CPU,
    PILOT_SEED,
    SUITES,
    Results,
    Suite,
    best_rate,
    ladder,
    losses,
    pilot_rates,
    rest_rate,
    results,
)
from benchmarks.methods import MAIN, OTHERS

CHOOSING = "<!-- table:choosing -->"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
# The plots name these.
SHOWN = (*(method.name for method in MAIN), "8-bit AdamW", "APOLLO-Mini", "SinkGD", "SLTrain")
PLOTS = Path(__file__).parents[1] / "docs" / "assets"
COMMAND = "python -m benchmarks.converge"


class Row(NamedTuple):
    """A method at its best rate: mean loss, loss by seed, and how the runs came about."""

    name: str
    loss: float
    seeds: Mapping[int, float]
    lr: float
    tried: int
    settled: bool
    # Of weights and state, for each weight of the dense hidden matrices.
    bytes_a_weight: float
    curve: tuple[tuple[int, float], ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < DIVERGED else math.inf


def rows(suite: Suite) -> list[Row]:
    """Everyone that has run, the best first."""
    known, pilot, found = results(suite), pilot_rates(suite), []
    for method in (*MAIN, *OTHERS):
        lr = best_rate(method.name, PILOT_SEED, known)
        if lr is None:
            continue
        runs = [row for (name, rate, _), row in known.items() if (name, rate) == (method.name, lr)]
        curves = zip(*(run["curve"] for run in runs))
        found.append(
            Row(
                method.name,
                statistics.mean(run["loss"] for run in runs),
                {run["seed"]: run["loss"] for run in runs},
                lr,
                len(losses(method.name, PILOT_SEED, known)),
                not ladder(method, PILOT_SEED, known, pilot),
                (runs[0]["bytes"]["hidden_weights"] + runs[0]["bytes"]["hidden_state"]) / dense_weights(),
                tuple((at[0]["tokens"], statistics.mean(point["loss"] for point in at)) for at in curves),
            )
        )
    return sorted(found, key=lambda row: row.loss)


def dense_weights(suite: Suite = CPU) -> int:
    """Weights of the hidden matrices of the suite's model."""
    shape = suite.shape
    width = shape["hidden_size"]
    return int(shape["num_hidden_layers"] * width * (4 * width + 3 * shape["intermediate_size"]))


def longest(names: Sequence[str]) -> Suite:
    """The longest suite in which all of these have run.

    Raises:
        ValueError: there is none.
    """
    for suite in SUITES.values():
        missing = {*names} - {row.name for row in rows(suite)}
        if not missing:
            return suite
    raise ValueError(f"Invalid results: no runs of {min(missing)}, expected those of {COMMAND}")


def perplexities(names: Sequence[str]) -> tuple[dict[str, float], str]:
    """Of some methods over the seeds that all of them have, and of what, in words.

    Raises:
        ValueError: a method without runs.
    """
    suite = longest(names)
    found = {row.name: row for row in rows(suite) if row.name in names}
    seeds = sorted(set.intersection(*(set(row.seeds) for row in found.values())))
    means = {name: statistics.mean(found[name].seeds[seed] for seed in seeds) for name in names}
    parameters = next(iter(results(suite).values()))["parameters"]
    words = f"a LLaMA of {parameters / 1e6:.1f} million parameters after {suite.tokens / 1e6:.1f} million tokens "
    words += f"({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    return {name: math.exp(loss) for name, loss in means.items()}, words


def choosing() -> str:
    """The tables of docs/choosing.md, the longer suite first."""
    return "\n\n".join(section(suite) for suite in SUITES.values() if results(suite))


def section(suite: Suite) -> str:
    """Everyone in a suite, and who is the best for less than so many bytes."""
    known, found = results(suite), rows(suite)
    best = [
        row
        for i, row in enumerate(found)
        if row.bytes_a_weight < min((b.bytes_a_weight for b in found[:i]), default=math.inf)
    ]
    lines = [f"- {row.bytes_a_weight:.2f} bytes a weight: {row.name}, perplexity {row.perplexity:.2f}" for row in best]
    missing = [name for name in [method.name for method in (*MAIN, *OTHERS)] if name not in {row.name for row in found}]
    ending = [f"\nNot run yet: {', '.join(missing)}."] if missing else []
    return "\n".join(
        [
            f"## After {suite.tokens / 1e6:.1f} million tokens", "",
            _table(suite, found), "", _caption(suite, known, found), "",
            "No method with fewer bytes of weights and state is better than these:", "", *lines, "",
            *_options(known), *ending,
        ]
    )  # fmt: skip


def _options(known: Results) -> list[str]:
    """What each variant of a method changes in its perplexity, over the runs that both have made."""
    lines = []
    for method in OTHERS:
        base = method.name.partition(",")[0]
        both = [
            row["loss"] - known[base, lr, seed]["loss"]
            for (name, lr, seed), row in known.items()
            if name == method.name != base and (base, lr, seed) in known
        ]
        if both:
            change = f"{100 * math.expm1(statistics.mean(both)):+.1f} %"
            lines.append(f"- {method.name}: perplexity {change} ({len(both)} run{'s' * (len(both) > 1)})")
    return lines and ["Options beside their defaults, at the same rate and from the same start:", "", *lines]


def _table(suite: Suite, found: Sequence[Row]) -> str:
    header = [
        "method",
        "perplexity",
        "seeds",
        "at a quarter of the tokens",
        "learning rate (tried)",
        "bytes a weight",
    ]
    cells = [
        [
            row.name, _perplexity(row), str(len(row.seeds)), _early(suite, row), f"{row.lr:.2g} ({_tried(row)})",
            f"{row.bytes_a_weight:.2f}",
        ]
        for row in found
    ]  # fmt: skip
    return markdown(header, cells)


def _perplexity(row: Row) -> str:
    if row.loss >= DIVERGED:
        return "diverged"
    spread = [math.exp(loss) for loss in row.seeds.values()]
    return f"{row.perplexity:.2f}" + (f" ({min(spread):.2f} … {max(spread):.2f})" if len(spread) > 1 else "")


def _early(suite: Suite, row: Row) -> str:
    at = [loss for tokens, loss in row.curve if tokens == suite.tokens // 4]
    return f"{math.exp(at[0]):.2f}" if at else "–"


def _tried(row: Row) -> str:
    return str(row.tried) if row.settled else f"{row.tried}, unfinished"


def _caption(suite: Suite, known: Results, found: Sequence[Row]) -> str:
    shape = suite.shape
    run = next(iter(known.values()))
    return "\n".join(
        (
            f"LLaMA of {run['parameters']:,} parameters (width {shape['hidden_size']}, {shape['num_hidden_layers']} "
            f"layers, vocabulary {shape['vocab_size']}), {suite.tokens:,} tokens of web text and Wikipedia, rank "
            f"{suite.rank}; perplexity on C4 with {suite.evaluated:,} tokens.",
            "Learning rate of the hidden matrices, the best of those tried in steps of 2; embeddings, head and vectors "
            f"have {rest_rate(known):g}. Bytes: weights and state of the hidden matrices in fp32, AdamW 12.",
            _order(found),
            f"Made by `{COMMAND} --suite {suite.name}`, drawn by `python -m benchmarks.table`.",
        )
    )


def _order(found: Sequence[Row]) -> str:
    by_name = {row.name: row for row in found}
    dense, low = by_name.get("AdamW"), by_name.get("low rank")
    if dense is None or low is None:
        return "AdamW and low rank have not both run yet."
    reading = "is ahead of" if dense.loss < low.loss else "is not ahead of"
    single = any(len(row.seeds) < 3 for row in found)
    return f"Dense AdamW {reading} plain low rank here ({dense.perplexity:.2f} and {low.perplexity:.2f})." + (
        " Rows with fewer than three seeds say little about differences of a few per cent." if single else ""
    )


def digest(found: Sequence[Row]) -> str:
    """Of what the plots show."""
    shown = [[row.name, row.curve, round(row.bytes_a_weight, 4)] for row in found]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def plotted() -> list[Row]:
    return rows(longest(SHOWN))


def stale_plots() -> list[str]:
    """The files whose plot is missing or shows other runs than those that exist."""
    expected = digest(plotted())
    paths = [PLOTS / name for name in PLOTTED]
    return [path.name for path in paths if not path.is_file() or expected not in path.read_text(encoding="utf-8")]


def draw_plots() -> None:
    """Write the plots that are out of date.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = plotted()
    for name in stale_plots():
        PLOTTED[name](found, PLOTS / name)


def _over_tokens(found: Sequence[Row], path: Path) -> None:
    figure, axes = _axes("tokens")
    for row in found:
        if row.name in SHOWN and row.loss < DIVERGED:
            axes.plot(*zip(*((at, math.exp(loss)) for at, loss in row.curve)), marker=".", label=row.name)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    _save(figure, path, digest(found))


def _over_memory(found: Sequence[Row], path: Path) -> None:
    figure, axes = _axes("bytes of weights and state for a weight of the hidden matrices")
    top = 1.2 * min(row.perplexity for row in found)
    beyond = []
    for row in found:
        if row.perplexity > top:
            beyond.append(f"{row.name} ({row.perplexity:.0f})")
            continue
        shown = row.name in SHOWN
        axes.plot(row.bytes_a_weight, row.perplexity, "o" if shown else ".", color="C0" if shown else "C7")
        if shown:
            place = (row.bytes_a_weight, row.perplexity)
            axes.annotate(row.name, place, (4, 3), textcoords="offset points", fontsize=8)
    axes.set_yscale("linear")
    if beyond:
        axes.set_title(f"above the picture: {', '.join(beyond)}", fontsize=8)
    _save(figure, path, digest(found))


PLOTTED: Mapping[str, Any] = {"converge_tokens.svg": _over_tokens, "converge_memory.svg": _over_memory}


def _axes(label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("validation perplexity")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _save(figure: Any, path: Path, shown: str) -> None:
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": shown}):
        figure.savefig(path, metadata={"Date": None, "Description": f"runs {shown}"})
