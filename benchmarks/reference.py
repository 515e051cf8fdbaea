"""How far every optimizer is from its authors' published trajectory: ``python -m benchmarks.reference``.

Runs the tests that meet the trajectories and writes what they recorded (``record_reference_error`` in
``tests/conftest.py``) to ``results/reference.json``: for each trajectory the largest difference over the largest
displacement.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import common

PREFIX = "reference error "


def recorded_errors(junit: Path) -> dict[str, dict[str, float]]:
    """Error by optimizer and test, from pytest's XML report."""
    errors: dict[str, dict[str, float]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        for entry in case.iter("property"):
            name = entry.get("name", "")
            if name.startswith(PREFIX):
                errors.setdefault(name.removeprefix(PREFIX), {})[case.get("name", "")] = float(
                    entry.get("value", "nan")
                )
    return errors


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        pytest = [sys.executable, "-m", "pytest", "tests/optim", "-n", "0", "-k", "golden or published or trajectory"]
        # The newer family has no room for properties of a test.
        report = ["-o", "junit_family=xunit1", f"--junitxml={junit}"]
        done = subprocess.run(
            [*pytest, *report],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit("benchmarks.reference: error: trajectories are not met, nothing written")
        errors = recorded_errors(junit)
    for name, cases in errors.items():
        print(f"{name}: {max(cases.values()):.1e} over {len(cases)} trajectories")
    print(common.write_result("reference", torch.device("cpu"), {"errors": errors}))


if __name__ == "__main__":
    main()
