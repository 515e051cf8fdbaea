"""docs/claims.md: what papers claim, what this project measures, and whether it agrees.

Our figures come from ``benchmarks/results`` and from closed forms that are computed here; the page is written by
``python -m benchmarks.table``. A claim about quality compares two methods of ``benchmarks.converge``, each at its best
learning rate: differences of less than :data:`SAME` of the perplexity count as none.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS, markdown, read_result
from benchmarks.converge_runs import SUITES
from benchmarks.converge_table import COMMAND, Row, rows
from lowrank_optim.memory.published import FULL, GALORE, LOW_RANK, RANKS, counts

BEGIN = "<!-- table:claims -->"
PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
SAME = 0.01
# Seeds that can contradict a paper.
ENOUGH = 3
# What a percentage may differ by, in points.
CLOSE = 1.5
NOT_RUN = ("–", "not run yet")


class Found(NamedTuple):
    """What we have, in words, and the verdict."""

    ours: str
    verdict: str


class Claim(NamedTuple):
    source: str
    claim: str
    published: str
    ours: Callable[[], Found | None]
    command: str


@cache
def converged(suite: str) -> dict[str, Row]:
    return {row.name: row for row in rows(SUITES[suite])}


def _pair(*names: str) -> list[Row] | None:
    """The rows of some methods in the longest suite that has them all, over the seeds that all of them have."""
    for suite in SUITES:
        known = converged(suite)
        found = [known[name] for name in names if name in known]
        common = set.intersection(*(set(row.seeds) for row in found)) if len(found) == len(names) else set()
        if common:
            kept = [{seed: row.seeds[seed] for seed in sorted(common)} for row in found]
            return [row._replace(loss=statistics.mean(seeds.values()), seeds=seeds) for row, seeds in zip(found, kept)]
    return None


def verdict(holds: bool, otherwise: str = "contradicted") -> str:
    return "reproduced" if holds else otherwise


def _of_runs(kind: str, *found: Row) -> str:
    """A verdict about training runs: only three seeds at settled rates contradict a claim."""
    count = min(len(row.seeds) for row in found)
    settled = all(row.settled for row in found)
    if kind == "contradicted" and not (count >= ENOUGH and settled):
        kind = "not reproduced"
    tokens = f"{found[0].curve[-1][0] / 1e6:.1f} M tokens"
    return f"{kind} ({count} seed{'s' * (count > 1)}, {tokens}{'' if settled else ', rates left to try'})"


def _compared(judge: Callable[..., Found], *names: str) -> Callable[[], Found | None]:
    """What ``judge`` says of the rows of these methods over the seeds that all have; None where one has not run."""

    def compare() -> Found | None:
        found = _pair(*names)
        return None if found is None else judge(*found)

    return compare


def better(method: str, than: str) -> Callable[[], Found | None]:
    """A claim that a method has a lower perplexity than another."""

    def judge(one: Row, other: Row) -> Found:
        ahead = other.perplexity / one.perplexity - 1
        kind = "reproduced" if ahead > SAME else "contradicted" if ahead < -SAME else "not reproduced"
        return Found(f"{method} {one.perplexity:.2f}, {than} {other.perplexity:.2f}", _of_runs(kind, one, other))

    return _compared(judge, method, than)


def as_good(method: str, as_: str, within: float) -> Callable[[], Found | None]:
    """A claim that a method is no worse than another, or by no more than ``within`` of the perplexity."""

    def judge(one: Row, other: Row) -> Found:
        behind = one.perplexity / other.perplexity - 1
        return Found(_apart(method, as_, one, other), _of_runs(verdict(behind <= within), one, other))

    return _compared(judge, method, as_)


def equal(method: str, package: str) -> Callable[[], Found | None]:
    """A claim of ours: the same perplexity as the published package."""

    def judge(one: Row, other: Row) -> Found:
        apart = one.perplexity / other.perplexity - 1
        return Found(_apart(method, package, one, other), _of_runs(verdict(abs(apart) <= SAME), one, other))

    return _compared(judge, method, package)


def _apart(method: str, other: str, ours: Row, theirs: Row) -> str:
    share = ours.perplexity / theirs.perplexity - 1
    return f"{method} {ours.perplexity:.2f}, {other} {theirs.perplexity:.2f} ({share:+.1%})"


def gap_closed() -> Found | None:
    """SST: by how much of the distance between low rank and dense it is better than low rank."""
    found = _pair("AdamW", "low rank", "SST")
    if found is None:
        return None
    dense, low, sst = found
    if low.perplexity <= dense.perplexity:
        return Found("low rank is not behind dense training here", _of_runs("not reproduced", dense, low, sst))
    change = (sst.perplexity - dense.perplexity) / (low.perplexity - dense.perplexity) - 1
    return Found(f"{change:+.1%}", _of_runs(verdict(change < -0.5), dense, low, sst))


def percent(published: float, ours: float, words: str = "") -> Found:
    return Found(f"{ours:+.1f} %{words}", verdict(abs(published - ours) <= CLOSE, "not reproduced"))


def galore_states() -> Found:
    size = counts("llama_1b", RANKS["llama_1b"])
    share = GALORE.part(1).parts(size)[0] / FULL.part(1).parts(size)[0]
    return percent(-65.5, 100 * (share - 1), ", LLaMA-1B, rank 512, embeddings counted as they are")


def restarts_memory() -> Found:
    size = counts("llama_1b", RANKS["llama_1b"])
    share = sum(LOW_RANK.parts(size)) / sum(GALORE.parts(size))
    return Found(f"{100 * (share - 1):+.1f} %, weights and states in bf16", verdict(share < 0.8, "not reproduced"))


def sltrain_memory() -> Found:
    """8-bit states, no gradients kept, an int64 index for each sparse value."""
    size = counts("llama_7b", RANKS["llama_7b"], 0.05)
    trained = size.L + size.S
    ours = 2 * trained + 8 * size.S + 2 * trained
    return percent(-73.0, 100 * (ours / (8 * size.P) - 1), " against bf16 weights, gradients and Adam's states")


def _memory_7b(method: str) -> Mapping[str, Any] | None:
    found = read_result("memory_7b")
    return next((row for row in found["rows"] if row["method"].startswith(method)), None) if found else None


def states_8bit() -> Found | None:
    row = _memory_7b("GaLoreAdamW8bit")
    if row is None:
        return None
    adam = FULL.part(1).parts(counts("llama_7b", 1024))[0]
    return percent(
        -82.5, 100 * (row["by_category"]["optimizer"] / adam - 1), ", embeddings and basis in full precision"
    )


def total_8bit() -> Found | None:
    row = _memory_7b("GaLoreAdamW8bit")
    if row is None:
        return None
    same = row["by_category"]["activations"] + row["by_category"]["other"]
    adam = 8 * counts("llama_7b", 1024).P + same
    return percent(-63.3, 100 * (row["peak_bytes"] / adam - 1), ", simulated peak with checkpointing")


def card(method: str, gigabytes: int, note: str = "") -> Callable[[], Found | None]:
    """A run of LLaMA-7B under a limit of a card's memory."""

    def look() -> Found | None:
        rows = _gpu("memory")
        row = next((row for row in rows if row.get("method", "").startswith(method)), None)
        if row is None or "process_bytes" not in row:
            return None
        used = row["process_bytes"] / 1e9
        holds = used < gigabytes and not note
        ours = f"{used:.1f} GB of the process, {row['device']}{note}"
        return Found(ours, verdict(holds, "not reproduced" if note else "contradicted"))

    return look


def _gpu(piece: str) -> list[dict[str, Any]]:
    path = RESULTS / "gpu.jsonl"
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["piece"] == piece]


def step_times(one: str, other: str) -> Callable[[], Found | None]:
    """A claim that the step of one optimizer is faster than that of another."""

    def look() -> Found | None:
        found = read_result("step")
        methods = found["models"]["llama_60m"]["methods"] if found else {}
        if one not in methods or other not in methods:
            return None
        ratio = methods[one]["to_floor"] / methods[other]["to_floor"]
        return Found(f"{100 * (ratio - 1):+.0f} % on a CPU, LLaMA-60M, rank 128", verdict(ratio < 1))

    return look


def lost_compute() -> Found | None:
    found = read_result("parameterizations_cpu")
    if found is None:
        return None
    ratios = [shape["layers"]["lost"]["times_dense"] for shape in found["shapes"]]
    return Found(f"{min(ratios):.2f} … {max(ratios):.2f} of a dense layer's time", verdict(max(ratios) < 1))


def trajectories() -> Found | None:
    found = read_result("reference")
    if found is None:
        return None
    worst = {name: statistics.median(errors.values()) for name, errors in found["errors"].items()}
    return Found(f"at most {max(worst.values()):.0e} of the distance, medians", verdict(max(worst.values()) < 1e-4))


def reproducible() -> Found | None:
    """Directions that two halves of a batch have in common."""
    found = read_result("diagnose")
    if found is None:
        return None
    largest = max(found["batches"], key=lambda batch: batch["tokens"])
    middle = {
        rank: statistics.median(layer["reproducible"] for layer in largest["layers"] if layer["rank"] == rank)
        for rank in found["ranks"]
    }
    counts = ", ".join(f"{value:.0f} of {rank}" for rank, value in middle.items())
    ours = f"{counts} (medians of matrices), width {found['width']}, halves of {largest['tokens']:,} tokens"
    highest = max(middle)
    return Found(ours, verdict(middle[highest] < highest / 2, "not reproduced"))


def scaling_alike() -> Found | None:
    found = read_result("diagnose")
    if found is None:
        return None
    value = statistics.median(matrix["scaling_correlation"] for matrix in found["scaling"])
    return Found(f"correlation {value:.2f} over columns (median of matrices)", verdict(value > 0.5, "not reproduced"))


def untestable(why: str) -> Callable[[], Found | None]:
    return lambda: Found(why, "not testable here")


PAPERS, CARD, STEP, DIAGNOSE = (
    "lowrank-memory papers", "python -m benchmarks.gpu", "python -m benchmarks.step",
    "python -m benchmarks.converge --suite cpu --diagnose",
)  # fmt: skip
MEMORY = "python -m benchmarks.memory_7b"
GALORE_, FIRA, APOLLO, DCT = "GaLore 2403.03507", "Fira 2410.01623", "APOLLO 2412.05270", "DCT-AdamW 2505.17967"
QGALORE, BENCHMARK, SCALE = "Q-GaLore 2407.08296", "Benchmarking 2505.22922", "SCALE 2506.16659"
CLAIMS = (
    Claim(GALORE_, "optimizer states smaller", "-65.5 %", galore_states, PAPERS),
    Claim(GALORE_, "8-bit states smaller, 7B", "-82.5 %", states_8bit, MEMORY),
    Claim(GALORE_, "total memory smaller, 7B", "-63.3 %", total_8bit, MEMORY),
    Claim(
        GALORE_,
        "7B on 24 GB without checkpointing",
        "22.0 GB",
        card("GaLoreAdamW8bit", 24, ", with checkpointing"),
        CARD,
    ),
    Claim(GALORE_, "near full rank", "34.88 against 34.06", as_good("GaLore", "AdamW", 0.03), COMMAND),
    Claim(GALORE_, "plain low rank far behind full rank", "78.18 against 34.06", better("AdamW", "low rank"), COMMAND),
    Claim(GALORE_, "better than ReLoRA", "34.88 against 37.04", better("GaLore", "ReLoRA"), COMMAND),
    Claim(QGALORE, "7B on 16 GB", "15.26 GB", card("QGaLoreAdamW8bit", 16), CARD),
    Claim(QGALORE, "as good as GaLore", "34.88 against 34.88", as_good("Q-GaLore", "GaLore", 0.02), COMMAND),
    Claim(
        QGALORE, "SVD calls needed", "36 %", untestable("a run of a few hundred updates has too few refreshes"), COMMAND
    ),
    Claim(FIRA, "better than GaLore", "31.06 against 34.88", better("Fira", "GaLore"), COMMAND),
    Claim(FIRA, "better than full rank", "31.06 against 34.06", better("Fira", "AdamW"), COMMAND),
    Claim(FIRA, "scaling of columns alike at low and full rank", "figure", scaling_alike, DIAGNOSE),
    Claim(APOLLO, "better than AdamW", "31.55 against 34.06", better("APOLLO", "AdamW"), COMMAND),
    Claim(APOLLO, "Mini better than AdamW", "31.93 against 34.06", better("APOLLO-Mini", "AdamW"), COMMAND),
    Claim(APOLLO, "7B with int8 weights on 12 GB", "below 12 GB", card("APOLLOMini", 12), CARD),
    Claim(DCT, "as good as LDAdam", "13.69 against 13.91", as_good("DCT", "LDAdam", 0.02), COMMAND),
    Claim(DCT, "faster than LDAdam", "39.3 h against 49.4 h", step_times("DCTAdamW", "LDAdamW"), STEP),
    Claim(DCT, "better than a random basis", "none given", better("DCT", "DCT, random basis"), COMMAND),
    Claim(DCT, "better than columns of the gradient", "none given", better("DCT", "DCT, identity basis"), COMMAND),
    Claim(DCT, "better with error feedback", "none given", better("DCT, error feedback", "DCT"), COMMAND),
    Claim("Trion 2505.17967", "near Muon", "15.30 against 14.99", as_good("Trion", "Muon", 0.03), COMMAND),
    Claim("LDAdam 2410.16103", "better than GaLore", "3.52 against 4.02 nats", better("LDAdam", "GaLore"), COMMAND),
    Claim("FRUGAL 2411.07837", "better than GaLore", "figure", better("FRUGAL", "GaLore"), COMMAND),
    Claim("GoLore 2410.11289", "better than GaLore", "figure", better("GoLore", "GaLore"), COMMAND),
    Claim("8-bit Adam 2110.02861", "as good as 32 bits", "equal", as_good("8-bit AdamW", "AdamW", SAME), COMMAND),
    Claim(SCALE, "Muon better than Adam, both tuned", "28.86 against 30.05", better("Muon", "AdamW"), COMMAND),
    Claim(SCALE, "as good as Adam", "30.81 against 30.05", as_good("SCALE", "AdamW", 0.03), COMMAND),
    Claim("SinkGD 2502.06742", "as good as Adam", "equal or better", as_good("SinkGD", "AdamW", 0.02), COMMAND),
    Claim("RACS 2502.07752", "better than Adam", "30.25 against 33.94", better("RACS", "AdamW"), COMMAND),
    Claim("Alice 2502.07752", "better than Adam", "28.69 against 33.94", better("Alice", "AdamW"), COMMAND),
    Claim("FOAM 2512.07112", "better than Adam", "28.53 against 30.05", better("FOAM", "AdamW"), COMMAND),
    Claim("LoRA-Pre 2602.24283", "better than GaLore", "32.57 against 34.88", better("LoRA-Pre", "GaLore"), COMMAND),
    Claim(
        "SLTrain 2406.02214",
        "near full rank",
        "16.2 against 15.4 at 1B, figure",
        as_good("SLTrain", "AdamW", 0.03),
        COMMAND,
    ),
    Claim("SLTrain 2406.02214", "total memory smaller, 7B", "-73 %", sltrain_memory, PAPERS),
    Claim("LOST 2508.02668", "better than full rank", "32.25 against 34.06", better("LOST", "AdamW"), COMMAND),
    Claim("LOST 2508.02668", "better than SLTrain", "15.02 against 16.2 at 1B", better("LOST", "SLTrain"), COMMAND),
    Claim("LOST 2508.02668", "less compute", "none given", lost_compute, "python -m benchmarks.parameterizations"),
    Claim("CoLA 2502.10940", "as good as full rank", "34.04 against 34.06", as_good("CoLA", "AdamW", 0.02), COMMAND),
    Claim(
        "LORO 2502.00018", "better than low rank", "24.77 against 45.51 at 130M", better("LORO", "low rank"), COMMAND
    ),
    Claim(BENCHMARK, "full rank best when tuned", "13.97 at 1B", better("AdamW", "low rank, restarts"), COMMAND),
    Claim(BENCHMARK, "restarts help low rank", "15.01 at 1B", better("low rank, restarts", "low rank"), COMMAND),
    Claim(BENCHMARK, "less memory than GaLore and Fira, 1B", "-25 %", restarts_memory, PAPERS),
    Claim(
        "SST 2405.15481", "gap to full rank smaller than low rank's", "-67.6 % (LoRA's, OPT-125M)", gap_closed, COMMAND
    ),
    Claim("2607.05872", "directions common to two batches", "39 of 128", reproducible, DIAGNOSE),
    Claim("HGF 2602.05269", "ternary weights with gated low rank", "0.9306", untestable("no TinyStories text"), "none"),
    Claim(
        "GaLore", "fine-tuning of RoBERTa on GLUE", "table", untestable("no GLUE data, no pretrained weights"), "none"
    ),
    Claim("SST", "node classification, translation", "tables", untestable("no such data"), "none"),
    Claim("this project", "steps equal the published packages'", "0", trajectories, "python -m benchmarks.reference"),
    Claim(
        "this project",
        "GaLore with refreshes by SVD trains like galore-torch",
        "equal",
        equal("GaLore, refresh by SVD", "galore-torch"),
        COMMAND,
    ),
    Claim(
        "this project",
        "GaLore's refresh by a power step is as good as by SVD",
        "equal",
        as_good("GaLore", "GaLore, refresh by SVD", SAME),
        COMMAND,
    ),
    Claim("this project", "APOLLO trains like apollo-torch", "equal", equal("APOLLO", "apollo-torch"), COMMAND),
    Claim("this project", "Fira trains like the package fira", "equal", equal("Fira", "fira (package)"), COMMAND),
)


def current() -> str:
    """The table of docs/claims.md."""
    converged.cache_clear()
    header = ["source", "claim", "published", "ours", "verdict", "command"]
    cells = []
    for claim in CLAIMS:
        ours, judged = claim.ours() or NOT_RUN
        command = "–" if claim.command == "none" else f"`{claim.command}`"
        cells.append([claim.source, claim.claim, claim.published, ours, judged, command])
    return markdown(header, cells, right=())
