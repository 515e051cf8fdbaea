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
    ("GaLoreAdamW", {"refresh": "svd", "selection": "spectral"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "int8", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "capturable": True}),
    ("GaLoreAdamW", {"weight_rounding": "stochastic", "proj_type": "full"}),
    ("GaLoreAdamW", {"weight_rounding": "compensated"}),
    ("GaLoreAdamW", {"state_dtype": "int8", "weight_rounding": "compensated", "capturable": True}),
    # Their layers are tested in tests/optim/test_loro.py and test_sst.py; here are ordinary parameters.
    ("LOROAdamW", {}),
    ("SSTAdamW", {}),
    ("GaLoreAdafactor", {"scale_parameter": False}),
    ("GaLoreAdafactor", {"beta1": 0.9, "moments": "rotate"}),
    ("GaLoreAdafactor", {"beta1": 0.9, "moments": "align", "refresh": "svd"}),
    ("GaLoreAdafactor", {"proj_type": "full", "beta1": 0.9}),
    ("GaLoreAdafactor", {"capturable": True}),
    ("GaLoreAdamW8bit", {}),
    ("GaLoreAdamW8bit", {"weight_rounding": "stochastic"}),
    ("QGaLoreAdamW8bit", {"queue_size": 1, "cos_threshold": 0.0}),
    ("QGaLoreAdamW8bit", {"moments": "rotate", "quant_group_size": 7, "weight_rounding": "compensated"}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in VARIANTS]


def accepts(name: str, key: str) -> bool:
    """Whether a constructor has an argument."""
    return key in inspect.signature(OPTIMIZERS[name]).parameters


# The rank of a method over lowrank_optim.nn belongs to the layers.
WITHOUT_RANK = {name for name in OPTIMIZERS if not accepts(name, "rank")}


def build(name: str, params: Any, **kwargs: Any) -> LowRankOptimizer:
    rank = {} if name in WITHOUT_RANK else {"rank": 4}
    return OPTIMIZERS[name](params, **{"lr": 1e-2, "update_proj_gap": 3, **rank, **kwargs})
