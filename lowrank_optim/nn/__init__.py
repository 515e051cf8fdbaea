"""Linear layers whose weight is held in parts: factors, sparse values, singular triplets, codes and scales."""

from lowrank_optim.nn.base import FactoredLinear, Parameterization
from lowrank_optim.nn.convert import compress, convert, merge, merged_state_dict, reset_parameters
from lowrank_optim.nn.hyperbolic import LorentzLinear
from lowrank_optim.nn.lost import LOST, LOSTLinear
from lowrank_optim.nn.lowrank import (
    LORO,
    CoLA,
    CoLALinear,
    LoRA,
    LoRALinear,
    LowRank,
    LowRankLinear,
    ReLoRA,
    ReLoRALinear,
)
from lowrank_optim.nn.maestro import Maestro, MaestroLinear, OrderedDropout
from lowrank_optim.nn.quantized import Int4Linear, Int8Linear, QuantizedLinear, quantize_weights
from lowrank_optim.nn.restarts import MergeAndRestart, MomentumReset, WeightRefactorization
from lowrank_optim.nn.sltrain import SLTrain, SLTrainLinear
from lowrank_optim.nn.spectral import SST, SSTLinear
from lowrank_optim.nn.ternary import TernaryLowRank, TernaryLowRankLinear

__all__ = [
    "LORO",
    "LOST",
    "SST",
    "CoLA",
    "CoLALinear",
    "FactoredLinear",
    "Int4Linear",
    "Int8Linear",
    "LOSTLinear",
    "LoRA",
    "LoRALinear",
    "LorentzLinear",
    "LowRank",
    "LowRankLinear",
    "Maestro",
    "MaestroLinear",
    "MergeAndRestart",
    "MomentumReset",
    "OrderedDropout",
    "Parameterization",
    "QuantizedLinear",
    "ReLoRA",
    "ReLoRALinear",
    "SLTrain",
    "SLTrainLinear",
    "SSTLinear",
    "TernaryLowRank",
    "TernaryLowRankLinear",
    "WeightRefactorization",
    "compress",
    "convert",
    "merge",
    "merged_state_dict",
    "quantize_weights",
    "reset_parameters",
]
