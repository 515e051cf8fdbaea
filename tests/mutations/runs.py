"""Running tests in a copy of the project: which test executes which line, and whether one notices a fault."""

from __future__ import annotations

import ast
import gc
import importlib
import json
import math
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.mutations.sites import Site, apply, functions, sources

# Imported once, before the forks, because they take longer than most tests.
PRELOADED = (
    *("torch", "numpy", "torch._dynamo", "transformers", "safetensors.torch", "accelerate", "hypothesis.stateful"),
    *("torch._inductor.compile_fx", "triton", "torch.distributed.checkpoint", "torch.distributed.tensor"),
)
# Rewritten assertions would say more to a reader, and there is none.
ARGUMENTS = (
    *("--import-mode=importlib", "--assert=plain", "-m", "not slow", "-q", "-o", "addopts="),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest", "-p", "no:anyio"),
    *("-p", "no:unraisableexception", "-p", "no:threadexception"),
)


def preload() -> None:
    """Import what every child process would import again."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Triton reads it when it is imported, here before the tests' own settings.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    # Or every child would search all of it for garbage.
    gc.collect()
    gc.freeze()


def copy_project(root: Path, into: Path) -> Path:
    """The files that git knows or does not ignore, in ``into``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, into / name)
    return into


def in_child(task: Any, seconds: float, *args: Any) -> Any:
    """What ``task(*args)`` returns in a process group of its own, None where it takes longer or dies.

    The seconds are counted while this process runs, so that it may be suspended.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        os.setsid()
        sys.stdout.flush()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sender.send(task(*args))
        sender.close()
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv() if any(receiver.poll(1.0) for _ in range(math.ceil(seconds))) else None
    except EOFError:
        return None
    finally:
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()


def _enter(project: Path) -> None:
    os.chdir(project)
    os.environ["PYTHONPATH"] = f"{project}:{project / 'kernels'}"
    sys.path[:] = [str(project), str(project / "kernels"), *(p for p in sys.path if p not in ("", str(project)))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "lowrank_optim", "benchmarks")]:
        del sys.modules[name]


class _Tracer:
    """Records for every test its outcome, its seconds and the lines of the sources that it executes."""

    def __init__(self, project: Path) -> None:
        self.paths = {str(path): str(path.relative_to(project)) for path in sources(project)}
        self.lines: set[tuple[str, int]] = set()
        self.tests: dict[str, dict[str, Any]] = {}

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename in self.paths else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.lines, start = set(), time.process_time()
        sys.settrace(self.call)
        yield
        sys.settrace(None)
        found = self.tests.setdefault(item.nodeid, {"passed": False})
        found["seconds"] = round(time.process_time() - start, 3)
        found["lines"] = [(self.paths[path], line) for path, line in self.lines]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.tests.setdefault(report.nodeid, {})["passed"] = report.passed


def _trace(project: Path, file: str) -> dict[str, Any]:
    _enter(project)
    tracer = _Tracer(project)
    pytest.main([*ARGUMENTS, file], plugins=[tracer])
    return tracer.tests


class Map:
    """Which test executes which line.

    A line is known by its text and the name of its function, so that the map outlives edits elsewhere and moves between
    files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "map"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.texts: dict[str, str] = {}
        self.lock = threading.Lock()
        self.seconds: dict[str, float] = {}
        self.of_line: dict[str, set[str]] = defaultdict(set)
        self.of_function: dict[str, set[str]] = defaultdict(set)
        self.of_file: dict[str, set[str]] = defaultdict(set)
        for file in self.folder.glob("*.json"):
            self._index(json.loads(file.read_text(encoding="utf-8")))

    def _index(self, entry: dict[str, Any]) -> None:
        self.texts[entry["file"]] = entry["text"]
        for test, found in entry["tests"].items():
            self.seconds[test] = found["seconds"]
            for place in found["places"]:
                path, _, rest = entry["places"][place].partition("|")
                function = rest.partition("|")[0]
                name = function.rpartition(".")[2]
                self.of_line[_key(rest)].add(test)
                self.of_function[function].add(test)
                self.of_function[name].add(test)
                self.of_file[path].add(test)

    def add(self, project: Path, file: str, seconds: float) -> None:
        """Trace one file of tests, unless it is in the map as it stands."""
        stamp = (project / file).read_text()
        if self.texts.get(file) == stamp:
            return
        tests = in_child(_trace, seconds, project, file)
        if tests is None:
            print(f"{file}: no map within {seconds:.0f} s")
            return
        paths = {path for found in tests.values() for path, _ in found.get("lines", ())}
        around = {path: _places((project / path).read_text()) for path in paths}
        places: dict[str, int] = {}
        kept = {}
        for test, found in tests.items():
            if found["passed"]:
                keys = {f"{path}|{around[path][line]}" for path, line in found["lines"]}
                kept[test] = {
                    "seconds": found["seconds"], "places": sorted(places.setdefault(key, len(places)) for key in keys),
                }  # fmt: skip
        entry = {"file": file, "text": stamp, "places": list(places), "tests": kept}
        (self.folder / f"{file.replace('/', '.')}.json").write_text(json.dumps(entry), encoding="utf-8")
        with self.lock:
            self._index(entry)
        print(f"{file}: {len(kept)} tests, {sum(t['seconds'] for t in kept.values()):.0f} s", flush=True)

    def tests_of(self, site: Site, root: Path) -> set[str]:
        """The tests that execute a fault's lines, or else its function, or where there is none its file.

        And those in files that import the module: what runs at import alone runs in whichever test comes first.
        """
        around = _places((root / site.path).read_text())
        keys = {_key(around[line]) for line in range(site.line, site.end_line + 1)}
        found = set().union(*(self.of_line.get(key, set()) for key in keys))
        name = site.function.rpartition(".")[2]
        # Not for the lines of a module or of a class, which run at import and are read by lines elsewhere.
        if found and name and not name.lstrip("_")[:1].isupper():
            return found | self.importing(site)
        inside = self.of_function.get(site.function) or set().union(
            *(of for key, of in self.of_function.items() if key.startswith(f"{site.function}."))
        )
        if site.function and (inside or name[:1].islower()):
            return (inside or self.of_function.get(name, set())) | self.importing(site)
        return self.of_file.get(site.path, set()) | self.importing(site)

    def importing(self, site: Site) -> set[str]:
        """The tests in files that import the module of a fault."""
        line = re.compile(rf"^(from|import) .*\b{Path(site.path).stem}\b", re.MULTILINE)
        files = {file for file, text in self.texts.items() if line.search(text)}
        return {test for test in self.seconds if test.partition("::")[0] in files}


def _places(text: str) -> dict[int, str]:
    """For every line its function and its text."""
    around = functions(ast.parse(text))
    return {i: f"{around.get(i, '')}|{line.strip()}" for i, line in enumerate(text.splitlines(), 1)}


def _key(place: str) -> str:
    function, _, line = place.partition("|")
    return f"{function.rpartition('.')[2]}|{line}"


def in_order(tests: set[str], seconds: dict[str, float], first: list[str], near: set[str], budget: float) -> list[str]:
    """At most ``budget`` seconds of tests: those of ``first``, then one case of every test, then a second one of each.

    Those of ``near`` come before the others, short ones before long ones.
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for test in sorted(tests, key=lambda t: (seconds.get(t, 0.0), t)):
        cases[test.partition("[")[0]].append(test)
    rounds = [(n, test not in near, seconds.get(test, 0.0), test) for of in cases.values() for n, test in enumerate(of)]
    chosen, total = [], 0.0
    for test in [t for t in first if t in tests] + [test for *_, test in sorted(rounds)]:
        if test not in chosen and total + seconds.get(test, 0.0) <= budget:
            chosen.append(test)
            total += seconds.get(test, 0.0)
    return chosen


class _Selected:
    """Runs some tests in a given order, and remembers the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}
        self.failed: str | None = None
        self.reason = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid
            self.reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")[:200]


def _attempt(project: Path, tests: list[str]) -> tuple[str, str | None, str]:
    _enter(project)
    selected = _Selected(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = pytest.main([*ARGUMENTS, "-x", *files], plugins=[selected])
    outcome = "survived" if code == pytest.ExitCode.OK else "killed"
    return outcome, selected.failed, selected.reason


class Copies:
    """Copies of the project, one for every fault that is being tried."""

    def __init__(self, root: Path, folder: Path, count: int) -> None:
        self.free: queue.Queue[Path] = queue.Queue()
        for i in range(count):
            self.free.put(copy_project(root, folder / str(i)))
        self.writes = 1_000_000_000

    def map_(self, tests: Map, file: str, seconds: float) -> None:
        """Bring the map of one file of tests up to date."""
        project = self.free.get()
        try:
            tests.add(project, file, seconds)
        finally:
            self.free.put(project)

    def try_(self, site: Site, tests: list[str], seconds: float) -> dict[str, Any]:
        """The outcome of one fault."""
        project = self.free.get()
        file = project / site.path
        before = file.read_bytes()
        start = time.perf_counter()
        try:
            self._write(file, apply(site, project).encode())
            result = in_child(_attempt, seconds, project, tests)
        finally:
            self._write(file, before)
            self.free.put(project)
        outcome, by, reason = result or ("timeout", None, "")
        return {
            "name": site.name, "kind": site.kind, "line": site.line, "outcome": outcome, "by": by, "reason": reason,
            "tests": len(tests), "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip

    def _write(self, file: Path, data: bytes) -> None:
        file.write_bytes(data)
        # A compiled file is known by the second of its source and by its size.
        self.writes += 1
        os.utime(file, (self.writes, self.writes))
