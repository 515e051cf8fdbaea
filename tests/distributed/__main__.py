"""Every optimizer under FSDP2 against one process: ``python -m tests.distributed [table] [checkpoints] [--write]``.

The table has, for every row of ``tests/optimizers.py``, how far the parameters are from those of one process after 20
updates, a refresh in every third, as a share of the largest value: with ``long_side``; in float64 also as
``fully_shard`` splits by itself, and on a mesh of two copies (HSDP). Weights in float64 and float32 train end to end.
With bfloat16 weights, with float32 weights and all moments in int8, for FRUGAL, whose signs turn a rounding into a
step, and for SVDs in float32, whose signs a rounding may turn, the gradients are given, so that only optimizers are
compared. In float64 an update follows whose gradient is not
finite on one process.

Checkpoints are runs that torch.distributed.checkpoint saves on 2 processes and that go on on 1, then 4, then 2, against
one process without a break.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from tests.distributed.fsdp import CHAIN, DTYPES, PLACEMENTS, Result, compare, fewer_bits, limit, resharded
from tests.distributed.processes import run
from tests.optimizers import IDS, VARIANTS

PARTS = ("table", "checkpoints")
# Their groups are the layers of a model.
OF_LAYERS = ("LOROAdamW", "SSTAdamW")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: both")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS, help="in float64")
    parser.add_argument("--each", type=int, default=len(IDS), metavar="N", help="at most N rows an optimizer")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/distributed.json")
    options = parser.parse_args()
    known = [i for i, name in enumerate(IDS) if options.only in name and VARIANTS[i][0] not in OF_LAYERS]
    names = [VARIANTS[i][0] for i in known]
    rows = [i for at, i in enumerate(known) if names[:at].count(names[at]) < options.each]
    figures: dict[str, Any] = {"updates": max(CHAIN), "table": [], "checkpoints": []}
    with tempfile.TemporaryDirectory() as folder:
        if "table" in (options.parts or PARTS):
            for section in table(options, rows, folder):
                figures["table"] += section
                write(options, figures)
        if "checkpoints" in (options.parts or PARTS):
            figures["checkpoints"] = checkpoints(rows, folder)
            write(options, figures)
    missed = sum(row["error"] is not None and row["error"] > row["limit"] for row in figures["table"])
    missed += sum(row["skipped"] is False for row in figures["table"])
    missed += sum(max(row["errors"]) > row["limit"] for row in figures["checkpoints"])
    print(f"\n{missed} missed")
    return int(missed > 0)


def write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Keep what is known so far, and what earlier calls have found of other rows."""
    if not options.write:
        return
    # Only a checkout has it.
    from benchmarks.common import read_result, write_result

    before = read_result("distributed") or {}
    kept = {}
    for part, keys in (("table", ("row", "processes", "dtype", "placement")), ("checkpoints", ("row",))):
        rows = [row for row in [*before.get(part, []), *figures[part]] if row["row"] in IDS]
        kept[part] = [*{tuple(row[key] for key in keys): row for row in rows}.values()]
    write_result("distributed", torch.device("cpu"), figures | kept)


def table(options: argparse.Namespace, rows: list[int], folder: str) -> Iterator[list[dict[str, Any]]]:
    """Every row in one world, dtype and placement after another."""
    for world in options.worlds:
        for dtype in options.dtypes:
            for placement in options.placements:
                if (placement == "replicated" and world < 4) or (placement != "long side" and dtype != "float64"):
                    continue
                print(f"\n{world} processes, {dtype}, {placement}", flush=True)
                results: list[Result] = run(compare, world, rows, dtype, placement, folder, True, start="fork")[0]
                setting = {"processes": world, "dtype": dtype, "placement": placement}
                yield [
                    {"row": IDS[i], **setting, **result._asdict(), "limit": limit(i, dtype)}
                    for i, result in zip(rows, results)
                ]


def checkpoints(rows: list[int], folder: str) -> list[dict[str, Any]]:
    """Every row that can be split, at every point where its run is saved."""
    print(f"\nsaved and continued on {', '.join(map(str, CHAIN.values()))} processes (float64)", flush=True)
    parts = [run(resharded, world, rows, folder, updates, start="fork")[0] for updates, world in CHAIN.items()]
    found = []
    for row, errors in zip(rows, zip(*parts)):
        if None in errors:
            continue
        bound = 0.05 if fewer_bits(row) else 1e-6
        met = "" if max(errors) <= bound else f"  MISSED {bound:g}"
        print(f"{IDS[row]:100.100} {' '.join(f'{error:8.1e}' for error in errors)}{met}", flush=True)
        found.append({"row": IDS[row], "processes": [*CHAIN.values()], "errors": errors, "limit": bound})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
