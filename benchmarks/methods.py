"""Who trains in ``benchmarks.converge``, with which arguments, and which learning rates each may try.

Rates are those of the hidden matrices; embeddings, head and vectors have the best of :data:`REST`. A method tries its
``start``, then the neighbours, a factor of 2 apart, of the best so far, until both are worse: no more than
2^-:data:`REACH` ... 2^:data:`REACH` times ``start``. One that ``follows`` another starts at the best rate of that one,
times ``factor`` where the two count in different units (GaLore's scale of 1/4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

REACH = 3
# Values that stand for those of the suite, see ``benchmarks.converge_runs.Suite``.
RANK, DOUBLE, HALF, QUARTER = "$rank", "$rank * 2", "$rank / 2", "$rank / 4"
GAP, LATE, REST_LR = "$gap", "$late", "$rest"


class Method(NamedTuple):
    """One method of the comparison.

    Attributes:
        name: in tables; the part before a comma is its family.
        optimizer: a class of lowrank_optim, "AdamW" for torch's, or a key of ``benchmarks.baselines.PEERS``.
        args: of the optimizer; see also :data:`RANK` and its neighbours.
        start: the rate to try first; None where it ``follows``.
        follows: the method whose best rate is tried first.
        factor: that rate times this.
        parameterization, parameterization_args, restarts, restart_args, weights: as the trainer has them.
        rest: rate of embeddings, head and vectors; None is the best of the pilots.
    """

    name: str
    optimizer: str
    args: Mapping[str, Any] = {}
    start: float | None = None
    follows: str | None = None
    factor: float = 1.0
    parameterization: str | None = None
    parameterization_args: Mapping[str, Any] = {}
    restarts: str = "none"
    restart_args: Mapping[str, Any] = {}
    weights: str | None = None
    rest: float | None = None


_LOW = {"rank": RANK, "update_proj_gap": GAP, "eps": 1e-8}
_GALORE = {**_LOW, "scale": 0.25}
_FACTORED = {"rank": RANK}
_SCALED = {"rank": RANK, "alpha": QUARTER}
_KAIMING = {**_SCALED, "init": "kaiming"}
_RESTARTS = {"every": GAP, "ramp": 5}
# Rates of embeddings, head and vectors that AdamW tries before all else; the best is everyone's.
REST = (2e-2, 1e-2, 4e-2)

PILOTS = tuple(Method(f"AdamW, rest {rate:g}", "AdamW", start=5e-3, rest=rate) for rate in REST)
# Those whose ladders and seeds come first.
MAIN = (
    Method("AdamW", "AdamW", start=5e-3),
    Method("GaLore", "GaLoreAdamW", _GALORE, start=2e-2),
    Method("Fira", "FiraAdamW", {**_LOW, "alpha": 0.25}, start=2e-2),
    Method("APOLLO", "APOLLOAdamW", _LOW, start=1e-2),
    Method("Muon", "Muon", start=5e-3),
    Method("DCT", "DCTAdamW", {"rank": RANK}, start=5e-3),
    Method("low rank", "AdamW", start=5e-3, parameterization="lowrank", parameterization_args=_KAIMING),
)
OTHERS = (
    Method("8-bit AdamW", "AdamW8bit", follows="AdamW"),
    Method("APOLLO-Mini", "APOLLOMini", {"update_proj_gap": GAP, "eps": 1e-8, "scale": 8.0}, follows="APOLLO"),
    Method("SLTrain", "AdamW", follows="low rank", parameterization="sltrain", parameterization_args=_SCALED),
    Method("SinkGD", "SinkGD", {"scale": 0.2}, follows="Muon"),
    Method("LDAdam", "LDAdamW", {"rank": RANK}, follows="DCT"),
    Method("FRUGAL", "FRUGALAdamW", _LOW, follows="AdamW"),
    Method("Q-GaLore", "QGaLoreAdamW8bit", _GALORE, follows="GaLore", weights="int8"),
    Method("Trion", "Trion", {"rank": RANK}, follows="Muon", factor=4.0),
    Method("RACS", "RACS", {"scale": 0.2}, follows="Muon"),
    Method("FOAM", "FOAM", {"scale": 1.0}, follows="AdamW"),
    Method("Alice", "Alice", {"rank": RANK, "leading": 5, "update_proj_gap": GAP}, follows="GaLore"),
    # Its bias correction makes steps up to six times too long at first.
    Method("LoRA-Pre", "LoRAPre", {"rank": RANK, "scale": 1.0}, follows="AdamW", factor=0.125),
    Method("LoRA-Pre, debias factor", "LoRAPre", {"rank": RANK, "scale": 1.0, "debias": "factor"}, follows="AdamW"),
    Method("galore-torch", "galore-torch GaLoreAdamW", follows="GaLore"),
    Method("apollo-torch", "apollo-torch APOLLO", follows="APOLLO"),
    Method("fira (package)", "fira FiraAdamW", follows="Fira"),
    Method("GaLore, refresh by SVD", "GaLoreAdamW", {**_GALORE, "refresh": "svd"}, follows="GaLore"),
    Method("GaLore, moments rotate", "GaLoreAdamW", {**_GALORE, "moments": "rotate"}, follows="GaLore"),
    Method("GaLore, moments align", "GaLoreAdamW", {**_GALORE, "moments": "align"}, follows="GaLore"),
    Method("GaLore, eps 1e-6", "GaLoreAdamW", {**_GALORE, "eps": 1e-6}, follows="GaLore"),
    Method("GoLore", "GoLoreAdamW", {**_GALORE, "random_from": LATE}, follows="GaLore"),
    Method("DCT, error feedback", "DCTAdamW", {"rank": RANK, "error_feedback": "full"}, follows="DCT"),
    Method("DCT, random basis", "DCTAdamW", {"rank": RANK, "basis": "random"}, follows="DCT"),
    Method("DCT, identity basis", "DCTAdamW", {"rank": RANK, "basis": "identity"}, follows="DCT"),
    Method("Fira, residual paper", "FiraAdamW", {**_LOW, "alpha": 0.25, "residual": "paper"}, follows="Fira"),
    Method("CoLA", "AdamW", follows="low rank", parameterization="cola", parameterization_args=_FACTORED),
    Method("LOST", "AdamW", follows="low rank", parameterization="lost", parameterization_args=_FACTORED),
    Method(
        "low rank, restarts", "AdamW", follows="low rank", parameterization="lowrank",
        parameterization_args=_KAIMING, restarts="refactorize", restart_args=_RESTARTS,
    ),
    Method(
        "ReLoRA", "AdamW", follows="low rank", parameterization="relora",
        parameterization_args=_SCALED, restarts="merge", restart_args=_RESTARTS,
    ),
    Method(
        "LORO", "LOROAdamW", {"update_proj_gap": GAP, "eps": 1e-8}, follows="low rank", parameterization="loro",
        parameterization_args=_FACTORED, restarts="reset", restart_args=_RESTARTS,
    ),
    Method(
        "SST", "SSTAdamW", {"update_proj_gap": 10}, follows="low rank", parameterization="sst",
        parameterization_args={"rank": QUARTER},
    ),
    Method("SCALE", "SCALE", {"adamw_lr": REST_LR}, follows="Muon", factor=0.5),
    Method("GaLore, rank d/8", "GaLoreAdamW", {**_GALORE, "rank": HALF}, follows="GaLore"),
    Method("GaLore, rank d/2", "GaLoreAdamW", {**_GALORE, "rank": DOUBLE}, follows="GaLore"),
    Method("APOLLO, rank d/8", "APOLLOAdamW", {**_LOW, "rank": HALF}, follows="APOLLO"),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in (*PILOTS, *MAIN, *OTHERS)}
