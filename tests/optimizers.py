"""The table that drives the conformance suite: one row a public optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import lowrank_optim
from lowrank_optim.optim.engine import LowRankOptimizer

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
    ("FiraAdamW", {}),
    ("FiraAdamW", {"residual": "paper", "proj_type": "reverse_std"}),
    ("FiraAdamW", {"limiter_gamma": None, "moments": "rotate"}),
    ("FiraAdamW", {"capturable": True, "residual": "paper"}),
    ("APOLLOAdamW", {}),
    ("APOLLOAdamW", {"proj": "svd", "scale_front": True, "proj_type": "left"}),
    ("APOLLOAdamW", {"scale_type": "tensor", "stagger": True}),
    ("APOLLOAdamW", {"moments": "rotate"}),
    ("APOLLOAdamW", {"moments": "align", "limiter_gamma": None}),
    ("APOLLOAdamW", {"capturable": True}),
    ("APOLLOMini", {"scale": 2.0}),
    ("FRUGALAdamW", {}),
    ("FRUGALAdamW", {"projection": "svd", "stagger": True}),
    ("FRUGALAdamW", {"projection": "random", "reset_moments": False, "moments": "align"}),
    ("FRUGALAdamW", {"reset_moments": False, "moments": "rotate"}),
    ("FRUGALAdamW", {"density": 0.4, "inactive_lr_scale": 0.1, "proj_type": "right"}),
    ("FRUGALAdamW", {"projection": "dct", "reset_moments": False, "moments": "rotate"}),
    ("FRUGALAdamW", {"capturable": True, "state_dtype": "bfloat16"}),
    ("FRUGALAdamW", {"weight_rounding": "stochastic", "state_dtype": "int8"}),
    ("FiraAdamW", {"weight_rounding": "compensated", "state_dtype": "bfloat16"}),
    ("APOLLOAdamW", {"weight_rounding": "stochastic", "state_dtype": "int8"}),
    ("GaLoreAdamW", {"refresh": "svd", "selection": "spectral"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "int8", "moments": "rotate"}),
    ("GaLoreAdamW", {"state_dtype": "int4", "moments": "rotate", "capturable": True}),
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
    ("GaLoreAdafactor", {"beta1": 0.9, "state_dtype": "bfloat16", "weight_rounding": "stochastic"}),
    ("GaLoreAdafactor", {"beta1": 0.9, "state_dtype": "int8", "weight_rounding": "compensated", "moments": "rotate"}),
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
    ("SinkGD", {}),
    ("SinkGD", {"iterations": 1, "weight_rounding": "compensated", "state_dtype": "int8", "capturable": True}),
    ("SCALE", {}),
    ("SCALE", {"weight_rounding": "stochastic", "adamw_lr": 1e-3, "capturable": True}),
    ("RACS", {}),
    ("RACS", {"iterations": 1, "limiter_gamma": None, "state_dtype": "bfloat16", "weight_rounding": "stochastic"}),
    ("Muon", {}),
    ("Muon", {"nesterov": False, "scaling": "kj", "ns_steps": 2, "state_dtype": "int8", "capturable": True}),
    ("GoLoreAdamW", {"random_from": 2}),
    ("GoLoreAdamW", {"random_from": 0, "state_dtype": "int8", "weight_rounding": "stochastic", "capturable": True}),
    ("FOAM", {}),
    ("FOAM", {"level": 1, "second_moment": "mean", "state_dtype": "int8", "weight_rounding": "stochastic"}),
    ("Alice", {}),
    ("Alice", {"leading": 2, "beta3": 0.0, "limiter_gamma": None, "state_dtype": "bfloat16", "capturable": True}),
    ("LoRAPre", {}),
    ("LoRAPre", {"debias": "factor", "weight_rounding": "compensated", "state_dtype": "int8", "capturable": True}),
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
