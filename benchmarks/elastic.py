"""Runs that change their number of processes, or lose one: ``python -m benchmarks.elastic [CASE...]``.

Runs cases of :mod:`tests.distributed.trainer` on this machine's CPU and adds what they measured to
``results/elastic.json``, from which ``python -m benchmarks.table`` writes the table in docs/distributed.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, needed_result, read_result, write_result

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN = "<!-- table:elastic -->"
MEASURED = ("copies", "shards", "there and back", "c4", "killed", "frozen")


def table(figures: Mapping[str, Any]) -> str:
    """The Markdown of what :func:`main` wrote."""
    found = figures["cases"]
    rows = []
    for case, kind in (("copies", "DistributedDataParallel"), ("shards", "`--fsdp`")):
        rows += [
            (f"{kind}, saved on 2 processes, loaded on 1 and 4", "state", found[case]["state"]),
            (f"{kind}, saved on 2, continued on 1", "loss", found[case]["on one"]["loss"]),
            (f"{kind}, saved on 1, continued on 4", "loss", found[case]["on four"]["loss"]),
        ]
    both = found["there and back"]
    rows += [
        ("saved with `--fsdp`, continued without", "loss", both["fp32, to copies"]["loss"]),
        ("saved without, continued with `--fsdp`", "loss", both["fp32, to shards"]["loss"]),
        ("sample of C4, `--fsdp` on 2, continued on 1", "loss", found["c4"]["loss"]),
    ]
    cells = [(what, of, _power(gap)) for what, of, gap in rows]
    cells += [
        (what, "end after", f"{found[case]['seconds']:.0f} s")
        for case, what in (("killed", "`kill -9` of a process"), ("frozen", "`kill -STOP` of a process"))
        if case in found
    ]
    return "\n".join(
        (
            markdown(("run", "", "largest difference"), cells, {2}),
            "",
            f"fp32, gloo on {figures['machine']['cores']} cores; 2 to 10 updates after the change. Made by",
            "`python -m benchmarks.elastic` and `python -m benchmarks.table`.",
        )
    )


def _power(gap: float) -> str:
    return "0" if gap == 0 else f"{gap:.0e}"


def current() -> str:
    """The table from the figures in ``results``.

    Raises:
        ValueError: nothing was measured.
    """
    figures = needed_result("elastic")
    return table(figures)


def main() -> None:
    # Its imports are those of a run, which a table does without.
    from tests.distributed.trainer import CASES, Runs

    os.environ["ACCELERATE_USE_CPU"] = "true"
    for case in sys.argv[1:] or MEASURED:
        with tempfile.TemporaryDirectory() as folder:
            found = CASES[case](Runs(Path(folder)))
        before = read_result("elastic")
        cases = {**(before["cases"] if before else {}), case: found}
        # Another case may not come to its end.
        print(case, found, write_result("elastic", torch.device("cpu"), {"cases": cases}), flush=True)


if __name__ == "__main__":
    main()
