"""The table that drives the conformance suite: one row a public optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import lowrank_optim
from lowrank_optim.optim.base import LowRankOptimizer

OPTIMIZERS: dict[str, type[LowRankOptimizer]] = {
    name: cls
    for name in lowrank_optim.__all__
    if inspect.isclass(cls := getattr(lowrank_optim, name)) and issubclass(cls, LowRankOptimizer)
}

# Constructor arguments beside rank=4, update_proj_gap=3 that the suite runs each class with.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {}),
    ("GaLoreAdamW", {"refresh": "svd"}),
    ("GaLoreAdamW", {"refresh": "randomized", "stagger": True}),
    ("GaLoreAdamW", {"moments": "align"}),
    ("GaLoreAdamW", {"moments": "rotate"}),
    ("GaLoreAdamW", {"proj_type": "reverse_std"}),
    ("GaLoreAdamW", {"proj_type": "left"}),
    ("GaLoreAdamW", {"proj_type": "right"}),
    ("GaLoreAdamW", {"proj_type": "full"}),
    ("GaLoreAdamW", {"capturable": True}),
    # Its layers are tested in tests/optim/test_sst.py; here are ordinary parameters.
    ("SSTAdamW", {}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in VARIANTS]


# The rank of a method over lowrank_optim.nn belongs to the layers.
WITHOUT_RANK = {name for name, cls in OPTIMIZERS.items() if "rank" not in inspect.signature(cls).parameters}


def build(name: str, params: Any, **kwargs: Any) -> LowRankOptimizer:
    rank = {} if name in WITHOUT_RANK else {"rank": 4}
    return OPTIMIZERS[name](params, **{"lr": 1e-2, "update_proj_gap": 3, **rank, **kwargs})
