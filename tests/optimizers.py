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
    ("GaLoreAdamW8bit", {}),
    ("GaLoreAdamW8bit", {"weight_rounding": "stochastic"}),
    ("QGaLoreAdamW8bit", {"queue_size": 1, "cos_threshold": 0.0}),
    ("QGaLoreAdamW8bit", {"moments": "rotate", "quant_group_size": 7, "weight_rounding": "compensated"}),
    ("DCTAdamW", {}),
    ("DCTAdamW", {"update_proj_gap": 1}),
    ("DCTAdamW", {"similarity": "fft", "error_feedback": "full"}),
    ("DCTAdamW", {"basis": "dct3", "ell_norm": 1, "similarity": "matmul", "error_feedback": "int8"}),
    ("DCTAdamW", {"basis": "identity", "stagger": True}),
    ("DCTAdamW", {"basis": "random", "rotate": False}),
    ("DCTAdamW", {"state_dtype": "int8", "error_feedback": "full", "weight_rounding": "compensated"}),
    ("DCTAdamW", {"capturable": True, "error_feedback": "int8", "state_dtype": "bfloat16"}),
    ("LDAdamW", {"update_proj_gap": 1}),
    ("LDAdamW", {"proj_method": "svd"}),
    ("LDAdamW", {"error_feedback": False, "proj_type": "reverse_std", "capturable": True}),
    ("LDAdamW", {"state_dtype": "bfloat16", "weight_rounding": "stochastic"}),
    ("Trion", {"update_proj_gap": 1}),
    ("Trion", {"basis": "identity", "scaling": "none", "stagger": True}),
    ("Trion", {"similarity": "fft", "state_dtype": "bfloat16", "weight_rounding": "compensated", "capturable": True}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in VARIANTS]


def build(name: str, params: Any, **kwargs: Any) -> LowRankOptimizer:
    return OPTIMIZERS[name](params, **{"lr": 1e-2, "rank": 4, "update_proj_gap": 3, **kwargs})
