"""``python -m tests.mutations``: puts faults into special cases one at a time and reports those that no test notices.

The first call finds out which test executes which line; later ones bring that up to date. What was tried stands in
``report.jsonl`` and is not tried again; ``--retry`` tries the survivors again, after tests were added.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.mutations.equivalent import reason_of
from tests.mutations.runs import Copies, Map, in_order, preload
from tests.mutations.sites import Site, find

ROOT = Path(__file__).parents[2]
# A file of tests that takes longer to trace stays out of the map.
MAP_SECONDS = 1200.0
TESTS = ("tests/optim", "tests/ops", "tests/kernels", "tests/pretrain", "tests/nn")


def main(arguments: list[str] | None = None) -> int:
    """The command; the number of survivors."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--sample", type=int, help="so many faults at random; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression that the name of a fault must match")
    parser.add_argument("--tests", default="", help="a regular expression that a file of tests must match")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of tests for one fault")
    parser.add_argument("--folder", type=Path, default=ROOT / ".mutations", help="of the map and the report")
    parser.add_argument("--retry", action="store_true", help="try those that survived again")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--no-map", action="store_true", help="take the map of tests as it is")
    args = parser.parse_args(arguments)
    chosen = choose(find(ROOT), args.only, args.sample, args.seed)
    if args.list:
        print(*(f"{site.kind:7} {site.line:4} {site.name}" for site in chosen), sep="\n")
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    preload()
    scratch = Path(tempfile.mkdtemp())
    try:
        return run(chosen, args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def choose(sites: list[Site], only: str, sample: int | None, seed: int) -> list[Site]:
    """Those that match ``only`` and are not known to change nothing, of which ``sample`` at random."""
    wanted = [site for site in sites if re.search(only, site.name) and reason_of(site) is None]
    if sample is None or sample >= len(wanted):
        return wanted
    return random.Random(seed).sample(wanted, sample)


def run(chosen: list[Site], args: argparse.Namespace, scratch: Path) -> int:
    """Try the chosen faults and print what became of them."""
    report = args.folder / "report.jsonl"
    done = read(report)
    copies = Copies(ROOT, scratch, args.jobs)
    tests = Map(args.folder)
    with ThreadPoolExecutor(args.jobs) as pool:
        if not args.no_map:
            files = sorted(str(p.relative_to(ROOT)) for folder in TESTS for p in (ROOT / folder).glob("test_*.py"))
            wanted = [file for file in files if re.search(args.tests, file)]
            for mapped in [pool.submit(copies.map_, tests, file, MAP_SECONDS) for file in wanted]:
                mapped.result()
        retried = {"survived", "timeout"} if args.retry else set()
        todo = [site for site in chosen if site.name not in done or done[site.name]["outcome"] in retried]
        killers: dict[str, list[str]] = {}

        # Before the first try: somebody may edit the sources meanwhile.
        found = {site: {test for test in tests.tests_of(site, ROOT) if re.search(args.tests, test)} for site in todo}

        def attempt(site: Site) -> dict[str, Any]:
            first = killers.setdefault(site.path, [])
            order = in_order(found[site], tests.seconds, first[:5], tests.importing(site), args.seconds)
            if not order:
                return {"name": site.name, "kind": site.kind, "line": site.line, "outcome": "survived", "by": None,
                        "reason": "no test executes it", "tests": 0, "seconds": 0.0}  # fmt: skip
            result = copies.try_(site, order, 60 + 4 * args.seconds)
            if result["by"]:
                first.insert(0, result["by"])
            return result

        futures = [pool.submit(attempt, site) for site in todo]
        for i, future in enumerate(as_completed(futures), 1):
            result = future.result()
            with report.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            done[result["name"]] = result
            print(
                f"{i}/{len(todo)} {result['outcome']:8} {result['seconds']:5.0f} s  {result['name'][:150]}", flush=True
            )
    return summarize([done[site.name] for site in chosen])


def read(report: Path) -> dict[str, dict[str, Any]]:
    """What was tried before, the last outcome of each."""
    if not report.exists():
        return {}
    return {
        entry["name"]: entry for line in report.read_text(encoding="utf-8").splitlines() for entry in [json.loads(line)]
    }


def summarize(results: list[dict[str, Any]]) -> int:
    """Print outcomes by kind, then the survivors; how many these are."""
    counts = Counter((result["kind"], result["outcome"]) for result in results)
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:8}" + "".join(f"{counts[kind, o]:6} {o}" for o in ("killed", "timeout", "survived")))
    survivors = [result for result in results if result["outcome"] == "survived"]
    print(f"{len(results)} faults, {len(survivors)} survived")
    for result in survivors:
        print(f"  line {result['line']}, {result['tests']} tests: {result['name']} {result['reason']}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
