"""Correctness: every kernel against fp64, whole optimizers against eager ones, replayed steps against launched ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.cases import Check, checks
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.kernel_steps import METHODS, distance, replay_distance
from benchmarks.kernels import STEP_TOLERANCE


def tasks(setting: Setting) -> list[Task]:
    found = [Task(check.name, partial(judged, check)) for check in checks(setting.device)]
    # In the interpreter the tests do it.
    methods = METHODS if setting.cuda else METHODS[:1]
    found += [Task(f"{method}, triton against eager", partial(apart, setting, method)) for method in methods]
    if setting.cuda:
        found += [
            Task(f"{method}, replayed against launched", partial(replayed, setting, method)) for method in METHODS
        ]
    return found


def judged(check: Check) -> dict[str, Any]:
    return check.judge(check.make())


def apart(setting: Setting, method: str) -> dict[str, Any]:
    value = distance(method, setting.device)
    return {"distance": value, "allowed": STEP_TOLERANCE, "right": value <= STEP_TOLERANCE}


def replayed(setting: Setting, method: str) -> dict[str, Any]:
    """No verdict: a library may take another algorithm while a graph is captured."""
    return {"largest_difference": replay_distance(method, setting.device)}
