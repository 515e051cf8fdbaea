"""What the optimizers are held to, beside what was measured: the end of ``benchmarks.step``'s output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Budget(NamedTuple):
    """``measured`` is to be at most ``limit``, or at least that where ``least``.

    two_gemms: what projecting and back-projecting alone would measure, where that says how far the limit is away.
    """

    name: str
    measured: float
    limit: float
    least: bool = False
    two_gemms: float | None = None

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.least else self.measured <= self.limit

    def line(self) -> str:
        """For a terminal."""
        bound = f", two GEMMs alone {self.two_gemms:.2f}" if self.two_gemms is not None else ""
        sign = ">=" if self.least else "<="
        return f"{self.name:52}{self.measured:9.2f} {sign} {self.limit:g} {'met' if self.met else 'MISSED'}{bound}"


def budgets(figures: Mapping[str, Any]) -> Iterator[Budget]:
    """Every budget that the figures of one model say something about."""
    methods = figures["methods"]
    to_floor = {name: row["to_floor"] for name, row in methods.items()}

    def step(ours: str, theirs: str | None, limit: float) -> Iterator[Budget]:
        if ours in to_floor and (theirs is None or theirs in to_floor):
            base = 1.0 if theirs is None else to_floor[theirs]
            yield Budget(f"{ours} / {theirs or 'two GEMMs'}", to_floor[ours] / base, limit, two_gemms=1 / base)

    yield from step("GaLoreAdamW", None, 1.12)
    yield from step("GaLoreAdamW", "galore-torch GaLoreAdamW", 0.85)
    yield from step("FiraAdamW", "GaLoreAdamW", 1.2)
    yield from step("FiraAdamW", "fira FiraAdamW", 0.45)
    yield from step("DCTAdamW", "LDAdamW", 1.0)
    yield from step("Trion", "torch Muon", 1.0)
    # A subspace iteration projects and back-projects once as well.
    svd, power = (figures["refresh"][kind] for kind in ("svd", "power"))
    bound = svd["seconds"]["median"] / figures["floor_seconds"]["median"]
    yield Budget("SVD / power refresh", power["svd_to_this"], 12.0, least=True, two_gemms=bound)
    yield Budget("staggered, slowest / median step", figures["stagger"]["slowest_to_median"], 1.2)
    for families, limit in ((("GaLore",), 0.0), (("Fira", "APOLLO", "DCT"), 1.0)):
        counts = [row["full_size_temporaries"] for name, row in methods.items() if name.startswith(families)]
        if counts:
            yield Budget(f"full-size tensors a matrix: {', '.join(families)}", max(counts), limit)
