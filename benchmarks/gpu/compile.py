"""Every kernel launched once, by several processes at a time, so that all others find it in Triton's cache."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu import check, kernels, steps
from benchmarks.gpu.cases import Check, checks
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting


def tasks(setting: Setting) -> list[Task]:
    """``took`` of a line is the time to compile it, unless another process did it before."""
    if not setting.cuda:
        return [Task("all kernels", lambda: {"reason": "an interpreter compiles nothing"})]
    found = [Task(one.name, partial(launched, one)) for one in checks(setting.device)]
    found += [Task(one.name, partial(check.apart, setting, one)) for one in check.wholes()]
    # A layer of each model has the shapes of all of it.
    rows = {row.name: row for row in (row._replace(whole=False) for row in steps.rows(setting).values())}
    found += [Task(name, partial(steps.twice, setting, row)) for name, row in rows.items()]
    return found + [Task(variant.name, partial(tile, setting, variant)) for variant in kernels.variants(setting)]


def tile(setting: Setting, variant: kernels.Variant) -> dict[str, Any]:
    with kernels.launched_with(variant, setting) as case:
        case.bound("triton")()
    return {"launched": True}


def launched(one: Check) -> dict[str, Any]:
    one.make().bound("triton")()
    return {"launched": True}
