"""The tables of docs/kernels.md: kernels compiled ahead of time, from what ``lowrank_kernels.compile`` wrote."""

from __future__ import annotations

from pathlib import Path

from lowrank_kernels.compile import Usage, markdown

from benchmarks.common import needed_result

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN = "<!-- table:aot -->"


def usages() -> dict[str, list[Usage]]:
    """The figures in ``results`` by version of triton, the oldest first.

    Raises:
        ValueError: nothing was compiled.
    """
    result = needed_result("aot", "lowrank_kernels.compile --json")
    return {version: [Usage(**row) for row in rows] for version, rows in sorted(result["kernels"].items())}


def current() -> str:
    """A table a version of triton.

    Raises:
        ValueError: nothing was compiled.
    """
    return "\n\n".join(f"### triton {version}\n\n{markdown(rows)}" for version, rows in usages().items())
