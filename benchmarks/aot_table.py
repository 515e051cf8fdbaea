"""The README's table of kernels compiled ahead of time, from what ``lowrank_kernels.compile`` wrote."""

from __future__ import annotations

from lowrank_kernels.compile import Usage, markdown

from benchmarks.common import read_result

BEGIN = "<!-- table:aot -->"


def current() -> str:
    """The table from the figures in ``results``.

    Raises:
        ValueError: nothing was compiled.
    """
    result = read_result("aot")
    if result is None:
        raise ValueError("Invalid results: no aot.json, run python -m lowrank_kernels.compile --json")
    rows = [Usage(**row) for row in result["kernels"]]
    made = f"Made by `{result['command']}`, triton {result['versions']['triton']}, and `python -m benchmarks.table`."
    return f"{markdown(rows)}\n{made}"
