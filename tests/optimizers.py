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
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "int8", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "capturable": True}),
    ("GaLoreAdamW", {"weight_rounding": "stochastic", "proj_type": "full"}),
    ("GaLoreAdamW", {"weight_rounding": "compensated"}),
    ("GaLoreAdamW", {"state_dtype": "int8", "weight_rounding": "compensated", "capturable": True}),
    # On parameters that are no factors; tests/optim/test_loro.py has the others.
    ("LOROAdamW", {}),
    # On ordinary parameters; tests/optim/test_sst.py has layers.
    ("SSTAdamW", {}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in VARIANTS]


def accepts(name: str, key: str) -> bool:
    """Whether a constructor has an argument; those that work on layers with a rank of their own have no ``rank``."""
    return key in inspect.signature(OPTIMIZERS[name]).parameters


def build(name: str, params: Any, **kwargs: Any) -> LowRankOptimizer:
    defaults = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3}
    return OPTIMIZERS[name](params, **{**{k: v for k, v in defaults.items() if accepts(name, k)}, **kwargs})
