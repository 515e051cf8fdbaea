"""Correctness: every kernel against fp64, whole optimizers against eager ones, replayed steps against launched ones.

What most steps launch comes first, then whole optimizers, then the kernels of single methods.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.baselines import own_names
from benchmarks.gpu.cases import Check, checks
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.kernel_steps import METHODS, distance, replay_distance
from benchmarks.kernels import STEP_TOLERANCE

# Where a sum in another order falls on the other side of a boundary, a value is off by a unit of bfloat16.
ROUNDED_TOLERANCE = 2.0**-6
ROUNDINGS = ("nearest", "stochastic", "compensated")
# Methods whose weights are rounded, each in another way.
ROUNDED = ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "APOLLOMini", "GaLoreAdamW8bit", "FRUGALAdamW")
# A direction without a kernel, so that only the default takes those that there are.
PARTLY = "GaLoreAdafactor"
STORED: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}),
    ("APOLLOAdamW", {"state_dtype": "int8"}),
    ("FiraAdamW", {"state_dtype": "int8", "capturable": True}),
]


class Whole(NamedTuple):
    """An optimizer that is held against itself without kernels."""

    method: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32

    @property
    def allowed(self) -> float:
        # Newton and Schulz iterate in bfloat16.
        return ROUNDED_TOLERANCE if self.dtype == torch.bfloat16 or self.method == "Trion" else STEP_TOLERANCE

    @property
    def name(self) -> str:
        more = [f"{key}={value}" for key, value in self.options.items()]
        more += ["bf16 weights"] if self.dtype == torch.bfloat16 else []
        return f"{', '.join([self.method, *more])}, triton against eager"


def wholes() -> list[Whole]:
    """Every method, moments in each dtype, and weights rounded in each way."""
    found = [Whole(method, {}) for method in own_names() if method != PARTLY]
    found.append(Whole(PARTLY, {"backend": None}, torch.bfloat16))
    found += [Whole(method, options) for method, options in STORED]
    rounded = zip(ROUNDED, ROUNDINGS * 2, strict=True)
    return found + [Whole(method, {"weight_rounding": how}, torch.bfloat16) for method, how in rounded]


def tasks(setting: Setting) -> list[Task]:
    found = checks(setting.device)
    # In the interpreter the tests do it.
    whole = wholes() if setting.cuda else wholes()[:1]
    return [
        *(Task(check.name, partial(judged, check)) for check in found if check.most_used),
        *(Task(one.name, partial(apart, setting, one)) for one in whole),
        *(Task(check.name, partial(judged, check)) for check in found if not check.most_used),
        *(
            Task(f"{method}, replayed against launched", partial(replayed, setting, method))
            for method in METHODS
            if setting.cuda
        ),
    ]


def judged(check: Check) -> dict[str, Any]:
    return check.judge(check.make())


def apart(setting: Setting, one: Whole) -> dict[str, Any]:
    value = distance(one.method, setting.device, dtype=one.dtype, **one.options)
    return {"distance": value, "allowed": one.allowed, "right": value <= one.allowed}


def replayed(setting: Setting, method: str) -> dict[str, Any]:
    """No verdict: a library may take another algorithm while a graph is captured."""
    return {"largest_difference": replay_distance(method, setting.device)}
