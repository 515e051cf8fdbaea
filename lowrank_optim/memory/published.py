"""The memory columns of the papers, recomputed: which way of counting gives which printed number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lowrank_optim.pretrain.llama import PRESETS

SIZES = ("llama_60m", "llama_130m", "llama_350m", "llama_1b")
# What the sizes are called. GaLore's tables make "B" of millions by dividing by 1024, and take 1.3B as it is.
NOMINAL = {"llama_60m": 60e6, "llama_130m": 130e6, "llama_350m": 350e6, "llama_1b": 1.3 * 1.024e9, "llama_7b": 7e9}
RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512, "llama_7b": 1024}

LEGEND = (
    "P parameters, E of them in embedding, head and norms, H in the head; at rank r, over the matrices m x n with "
    "m <= n: B = sum m r, M = sum n r, L = E + B + M; S sparse values; N as the size is called. G is bytes."
)


class Counts(NamedTuple):
    """Elements of a preset at a rank, by the letters of :data:`LEGEND`."""

    P: int
    E: int
    H: int
    B: int
    M: int
    L: int
    S: int
    N: float


def counts(size: str, rank: int, sparsity: float = 0.03) -> Counts:
    """Counts of a preset; ``sparsity`` is SLTrain's share of sparse values."""
    shape = PRESETS[size]
    d, f = shape.hidden, shape.intermediate
    matrices = ([(d, d)] * 4 + [(d, f)] * 3) * shape.layers
    head = shape.vocab * d
    rest = 2 * head + (2 * shape.layers + 1) * d
    basis, moment = (sum(side * rank for side in sides) for sides in zip(*matrices))
    sparse = sum(int(sparsity * m * n) for m, n in matrices)
    total = rest + sum(m * n for m, n in matrices)
    return Counts(total, rest, head, basis, moment, rest + basis + moment, sparse, NOMINAL[size])


def rounded(parts: Sequence[float]) -> float:
    return round(sum(parts) + 1e-9, 2)


def cut(parts: Sequence[float]) -> float:
    return math.floor(100 * sum(parts) + 1e-9) / 100


def parts_rounded(parts: Sequence[float]) -> float:
    return round(sum(round(part + 1e-9, 2) for part in parts), 2)


class Row(NamedTuple):
    """One row of a table: printed numbers, the same recomputed, and how."""

    method: str
    printed: tuple[float, ...]
    recomputed: tuple[float, ...]
    counting: str


class Table(NamedTuple):
    """Rows of one printed table; ``unit`` says what 1 G is and how it is rounded."""

    name: str
    unit: str
    rows: list[Row]
    note: str = ""
    sizes: tuple[str, ...] = SIZES

    @property
    def matches(self) -> tuple[int, int]:
        """How many printed numbers are found, of how many."""
        pairs = [pair for row in self.rows for pair in zip(row.printed, row.recomputed)]
        return sum(printed == found for printed, found in pairs), len(pairs)


class Formula(NamedTuple):
    """Bytes of weights and of states in the letters of :data:`LEGEND`, each in brackets: "(2P) + (4E+2B+4M)"."""

    counting: str

    def parts(self, c: Counts) -> list[float]:
        """What each bracket comes to."""
        brackets = [re.findall(r"([\d.]*)([A-Z])", part) for part in self.counting.split(" + ")]
        return [sum(float(factor or 1) * getattr(c, letter) for factor, letter in terms) for terms in brackets]

    def row(
        self,
        method: str,
        printed: Sequence[float],
        unit: float = 1e9,
        ending: Callable[[Sequence[float]], float] = rounded,
        *,
        sizes: Sequence[str] = SIZES,
        rank: int | None = None,
    ) -> Row:
        """A row of what this formula gives, at the rank of GaLore's Table 2 or another one."""
        found = [[part / unit for part in self.parts(counts(size, rank or RANKS[size]))] for size in sizes]
        return Row(method, tuple(printed), tuple(ending(parts) for parts in found), self.counting)

    def part(self, index: int) -> Formula:
        """The weights (0) or the states (1) alone."""
        return Formula(self.counting.split(" + ")[index])


FULL = Formula("(2P) + (4P)")
GALORE = Formula("(2P) + (4E+2B+4M)")
LOW_RANK = Formula("(2L) + (4L)")
LORA = Formula("(2P+2B+2M) + (4L)")
STATELESS = Formula("(2P) + (4E)")
SCALE = Formula("(2P) + (2H)")

GIB, K1024 = 2**30, 1.024e9
GALORE_2 = {
    "Full-rank": (0.36, 0.76, 2.06, 7.80),
    "GaLore": (0.24, 0.52, 1.22, 4.38),
    "Low-Rank": (0.26, 0.54, 1.08, 3.57),
    "LoRA": (0.36, 0.80, 1.76, 6.17),
    "ReLoRA": (0.36, 0.80, 1.76, 6.17),
}
GALORE_6A = {
    **dict.fromkeys(("Full-rank", "GaLore"), (0.12, 0.25, 0.68, 2.60)),
    "Low-Rank": (0.08, 0.18, 0.36, 1.19),
    **dict.fromkeys(("LoRA", "ReLoRA"), (0.20, 0.44, 1.04, 3.79)),
}
GALORE_6B = {
    "Full-rank": (0.23, 0.51, 1.37, 5.20),
    "GaLore": (0.13, 0.28, 0.54, 1.78),
    **dict.fromkeys(("Low-Rank", "LoRA", "ReLoRA"), (0.17, 0.37, 0.72, 2.38)),
}
EXACT = dict(zip(GALORE_2, (FULL, GALORE, LOW_RANK, LORA, LORA)))
NAMED_LORA = Formula("(2N+2L) + (4L)")
NAMED = dict(zip(GALORE_2, (Formula("(2N) + (4N)"), Formula("(2N) + (3L)"), LOW_RANK, NAMED_LORA, NAMED_LORA)))


def tables() -> list[Table]:
    """Every column that is recomputed, by the convention that fits it best."""
    return [*_galore(), *_after_galore(), *_sltrain_and_scale(), _racs(), *_7b()]


def _galore() -> list[Table]:
    def rows(formulas: dict[str, Formula], *how: Any) -> list[Row]:
        return [formulas[method].row(method, printed, *how) for method, printed in GALORE_2.items()]

    def part(index: int, printed: Mapping[str, tuple[float, ...]]) -> list[Row]:
        return [NAMED[method].part(index).row(method, numbers, K1024) for method, numbers in printed.items()]

    by_formula = "the formula of the paper's Table 1 with exact counts, which is what the code keeps"
    named = "nominal sizes; LoRA holds the embeddings twice; GaLore's states are 3/4 of LoRA's, embeddings included"
    return [
        Table("GaLore (2403.03507), Table 2, exact", "10^9 bytes, rounded", rows(EXACT), by_formula),
        Table("GaLore, Table 2, exact", "2^30 bytes, rounded", rows(EXACT, GIB), by_formula),
        Table("GaLore, Table 2, as it follows", "1.024 10^9 bytes, cut off", rows(NAMED, K1024, cut), named),
        Table("GaLore, Table 6a, weights", "1.024 10^9 bytes, rounded", part(0, GALORE_6A), named),
        Table("GaLore, Table 6b, states", "1.024 10^9 bytes, rounded", part(1, GALORE_6B), named),
    ]


def _after_galore() -> list[Table]:
    """Papers that take their baselines' numbers from GaLore's tables."""
    weights, total = GALORE_6A["GaLore"], GALORE_2["GaLore"]
    half = tuple(cut([t, -w / 2]) for t, w in zip(total, weights))

    def with_gradients(name: str, method: str, trained: str, printed: tuple[float, ...]) -> Row:
        found = tuple(rounded(pair) for pair in zip(GALORE_2[method], GALORE_6A[trained]))
        return Row(name, printed, found, f"GaLore's Table 2 + {trained} of its Table 6a")

    return [
        Table(
            "Q-GaLore (2407.08296), Table 1",
            "as GaLore's",
            [Row("Q-GaLore", (0.18, 0.39, 0.88, 3.08), half, "GaLore's Table 2 - half of its Table 6a")],
            "8-bit states and the 4-bit basis are not credited",
        ),
        Table(
            "Fira (2410.01623), Table 3",
            "as GaLore's",
            [
                with_gradients("Full-rank", "Full-rank", "Full-rank", (0.48, 1.01, 2.74, 10.40)),
                with_gradients("Fira, GaLore", "GaLore", "GaLore", (0.36, 0.77, 1.90, 6.98)),
                with_gradients("LoRA, ReLoRA", "LoRA", "Low-Rank", (0.44, 0.99, 2.12, 7.36)),
            ],
            "gradients included",
        ),
        Table(
            "APOLLO (2412.05270), Table 2",
            "1.024 10^9 bytes, rounded",
            [
                Formula("(2N) + (1.5L)").row("APOLLO, half rank", (0.18, 0.39, 0.95, 3.49), K1024),
                Formula("(2N)").row("APOLLO-Mini", (0.12, 0.25, 0.69, 2.60), K1024),
            ],
            "half of GaLore's states, those of the embeddings included, and none for APOLLO-Mini",
        ),
    ]


def _sltrain_and_scale() -> list[Table]:
    second_hand = {
        "Full-rank": (FULL, (0.35, 0.81, 2.21, 8.04)),
        "Low-Rank": (LOW_RANK, (0.24, 0.57, 1.11, 3.66)),
        "ReLoRA": (Formula("(2P+2L) + (4L)"), (0.36, 0.84, 1.85, 6.34)),
        "GaLore": (GALORE, (0.28, 0.61, 1.59, 4.76)),
        "SLTrain": (Formula("(2L+2S+8S) + (4L+4S)"), (0.26, 0.60, 1.24, 4.16)),
    }
    return [
        Table(
            "SLTrain (2406.02214), Table 2",
            "10^9 bytes; weights and states rounded, then added",
            [formula.row(name, printed, 1e9, parts_rounded) for name, (formula, printed) in second_hand.items()],
            "printed numbers at second hand; sparse values with an int64 index",
        ),
        Table(
            "SCALE (2506.16659), README",
            "10^9 bytes, rounded; Adam's weights and states rounded, then added",
            [
                FULL.row("Adam, Stable-SPAM", (0.35, 0.81, 2.21, 8.04), 1e9, parts_rounded),
                Formula("(2P) + (2P)").row("Muon", (0.23, 0.54, 1.47, 5.36)),
                GALORE.row("GaLore, Fira, APOLLO", (0.28, 0.61, 1.59, 4.76)),
                STATELESS.row("SWAN, APOLLO-Mini", (0.25, 0.46, 1.00, 3.20)),
                SCALE.row("SCALE", (0.15, 0.32, 0.80, 2.81)),
            ],
            "1.59 would need rank 388",
        ),
        Table(
            "SCALE, README, 7B",
            "10^9 bytes, rounded",
            [
                Formula("(2P) + (4E+4M)").row("APOLLO, rank 256", (16.14,), sizes=("llama_7b",), rank=256),
                STATELESS.row("APOLLO-Mini", (14.53,), sizes=("llama_7b",)),
                SCALE.row("SCALE", (13.74,), sizes=("llama_7b",)),
            ],
            sizes=("llama_7b",),
        ),
    ]


def _racs() -> Table:
    rows = [
        FULL.row("Adam", (0.32, 0.75, 2.05, 7.48), GIB),
        Row("GaLore, Fira, head too", (0.21, 0.51, 1.2, 4.25), _head_projected(), "(2P) + (4E-4H+2B+4M), head in B, M"),
        GALORE.row("GaLore, Fira", (0.26, 0.57, 1.29, 4.43), GIB),
        STATELESS.row("APOLLO-Mini, RACS", (0.23, 0.43, 0.93, 2.98), GIB),
    ]
    return Table("RACS (2502.07752), Table 3", "2^30 bytes, rounded", rows)


def _head_projected() -> tuple[float, ...]:
    found = []
    for size in SIZES:
        shape, c = PRESETS[size], counts(size, RANKS[size])
        # The head is vocabulary x hidden: its basis has hidden r values, a moment of it vocabulary r.
        head = 2 * shape.hidden * RANKS[size] + 4 * shape.vocab * RANKS[size]
        found.append(rounded([(2 * c.P + 4 * (c.E - c.H) + 2 * c.B + 4 * c.M + head) / GIB]))
    return tuple(found)


def _7b() -> list[Table]:
    size = ("llama_7b",)
    whole, tenths = (lambda parts: float(round(sum(parts)))), (lambda parts: round(sum(parts), 1))
    adam_8bit, galore_8bit = Formula("(2N) + (2N)"), Formula("(2P) + (2E+2B+2M)")
    apollo, q_galore = Formula("(4M)"), Formula("(P+E) + (2E+2M+0.5B)")
    return [
        Table(
            "GaLore, Table 3, 7B",
            "2^30 bytes",
            [
                adam_8bit.row("8-bit Adam", (26.0,), GIB, whole, sizes=size),
                adam_8bit.part(1).row("its states", (13.0,), GIB, whole, sizes=size),
                galore_8bit.row("8-bit GaLore", (18.0,), GIB, whole, sizes=size),
                galore_8bit.part(1).row("its states", (4.9,), GIB, tenths, sizes=size),
            ],
            "8-bit Adam by the nominal size, GaLore exact, with a basis of 2 bytes a value; 4.9 is not found",
            size,
        ),
        Table(
            "APOLLO, Table 3, 7B",
            "10^9 bytes",
            [apollo.row("APOLLO's states, rank 256", (1.6,), 1e9, tenths, sizes=size, rank=256)],
            "those of embedding and head, 1.05 G, left out",
            size,
        ),
        Table(
            "Q-GaLore, Table 2, 7B",
            "2^30 bytes",
            [q_galore.row("Q-GaLore", (15.0,), GIB, whole, sizes=size)],
            "printed is a measured total, recomputed are weights and states",
            size,
        ),
    ]


def sheet(found: Sequence[Table]) -> str:
    """The tables as text: printed, and in brackets what was found instead."""
    lines = [LEGEND]
    for table in found:
        good, all_ = table.matches
        lines += ["", f"{table.name}: {good}/{all_} ({table.unit})"]
        lines += [f"  {table.note}"] * bool(table.note)
        width = max(len(row.method) for row in table.rows)
        for row in table.rows:
            cells = (_cell(*pair) for pair in zip(row.printed, row.recomputed))
            lines.append(f"  {row.method:{width}}{''.join(cells)}   {row.counting}")
    return "\n".join(lines)


def _cell(printed: float, found: float) -> str:
    return f"{f'{printed:.4g}' if printed == found else f'{printed:.4g} [{found:.4g}]':>15}"


def as_dict(found: Sequence[Table]) -> dict[str, Any]:
    """The tables for JSON."""
    return {
        "legend": LEGEND,
        "tables": [
            {
                **table._asdict(),
                "rows": [row._asdict() for row in table.rows],
                "matches": table.matches[0],
                "numbers": table.matches[1],
            }
            for table in found
        ],
    }
