"""The tests of the kernels, on this device."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.record import Task
from benchmarks.gpu.runner import ROOT
from benchmarks.gpu.setting import Setting

WORKERS = 12


def tasks(setting: Setting) -> list[Task]:
    return [Task("tests/kernels", partial(run, setting))]


def run(setting: Setting) -> dict[str, Any]:
    """How many passed, failed and were skipped, and what the failed ones said; without a GPU a few of them."""
    report = setting.scratch / "report.xml"
    which = ["tests/kernels", "-n", str(WORKERS)] if setting.cuda else ["tests/kernels/test_gaussian.py", "-n", "0"]
    command = [sys.executable, "-m", "pytest", *which, "-q"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    # The tests themselves choose the interpreter, where there is no GPU.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-20000:], done.stderr[-2000:])
    if not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {
        kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")
    }
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (case.find(kind).get("message") or "")[:200]  # type: ignore[union-attr]
        for kind in ("failure", "error")
        for case in outcomes[kind]
    }
    return {
        "passed": len(cases) - sum(map(len, outcomes.values())),
        "failed": failed,
        "skipped": len(outcomes["skipped"]),
        "right": done.returncode == 0,
    }
