"""Weight parameterizations and restarts by name, with their published settings, for the command lines.

Sources: the shell scripts of SLTrain (2406.02214, ``scripts/llm_pretrain``), CoLA (2502.10940) and LORO (2502.00018);
GaLore's Table 2 (2403.03507) for the ranks of LowRank, LoRA and ReLoRA. For LOST and SST no script is public: the
settings are those of the authors' neighbouring code and of the papers' text.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

import lowrank_optim.nn
from lowrank_optim.nn import (
    MergeAndRestart,
    MomentumReset,
    OrderedDropout,
    Parameterization,
    WeightRefactorization,
    convert,
)
from lowrank_optim.nn.restarts import Restart
from lowrank_optim.pretrain.optimizers import check_keys

# Published together with restarts.
RESTARTS = {"loro": "reset", "relora": "merge", "maestro": "dropout"}

PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    name.lower(): cls
    for name in lowrank_optim.nn.__all__
    if inspect.isclass(cls := getattr(lowrank_optim.nn, name))
    and issubclass(cls, Parameterization)
    and cls is not Parameterization
}


class Published(NamedTuple):
    """What one model size was trained with; None stands for what the size has whatever the method."""

    args: Mapping[str, Any]
    lr: float = 1e-3
    max_steps: int | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    grad_clip: float | None = None
    optimizer_args: Mapping[str, Any] = {}
    restart_args: Mapping[str, Any] = {}


def _cola(rank: int, lr: float, warmup: int, hidden_act: str) -> Published:
    return Published({"rank": rank, "hidden_act": hidden_act}, lr, None, warmup, 0.01, 0.5)


def _loro(rank: int, lr: float, gap: int, warmup: int | None = None) -> Published:
    # Beside every exact step, the warm-up's included, all moments start anew and the rate rises over five updates.
    restart = {"every": gap, "ramp": 5, "first": 0}
    return Published({"rank": rank}, lr, None, warmup, optimizer_args={"update_proj_gap": gap}, restart_args=restart)


def _relora(rank: int, every: int = 1000, ramp: int = 100) -> Published:
    # The learning rate is about twice that of full-rank training, the ramp 100 updates.
    return Published({"rank": rank, "alpha": 32, "dropout": 0.1}, 2e-3, restart_args={"every": every, "ramp": ramp})


_RANKS = {"llama_tiny": 64, "llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512, "llama_7b": 1024}
_WIDTHS = {"llama_60m": 512, "llama_130m": 768, "llama_350m": 1024, "llama_1b": 2048, "llama_7b": 4096}

PUBLISHED: dict[str, dict[str, Published]] = {
    "sltrain": {
        "llama_60m": Published({"rank": 128, "sparsity": 0.03, "alpha": 32}, 3e-3, 11_000, 1100),
        "llama_130m": Published({"rank": 256, "sparsity": 0.03, "alpha": 16}, 3e-3, 22_000, 2200),
        "llama_350m": Published({"rank": 256, "sparsity": 0.03, "alpha": 16}, 3e-3, 65_000, 6500),
        "llama_1b": Published({"rank": 512, "sparsity": 0.03, "alpha": 8}, 3e-3, 140_000, 10_000),
        "llama_7b": Published({"rank": 1024, "sparsity": 0.05, "alpha": 8}, 3e-3, 150_000, 15_000, grad_clip=1.0),
    },
    "lost": {
        size: Published({"rank": rank, "sparsity": 0.01, "gamma": 0.7}, lr, weight_decay=0.01, grad_clip=0.5)
        for (size, rank), lr in zip(_RANKS.items(), (3e-3, 3e-3, 3e-3, 3e-3, 2e-3, 1e-3), strict=True)
    },
    "sst": {size: Published({"rank": width // 16}, 1e-3, None, 2000) for size, width in _WIDTHS.items()}
    | {"llama_tiny": Published({"rank": 16}, 3e-3, optimizer_args={"update_proj_gap": 10})},
    "lowrank": {size: Published({"rank": rank}) for size, rank in _RANKS.items()}
    # The one published script of arXiv 2505.22922.
    | {"llama_60m": Published({"rank": 128, "alpha": 32, "init": "kaiming"}, 1.5e-3, 11_000, 1100)},
    "cola": {
        "llama_60m": _cola(128, 6e-3, 2000, "silu"),
        "llama_130m": _cola(256, 3e-3, 2000, "silu"),
        "llama_350m": _cola(256, 3e-3, 6000, "linear"),
        "llama_1b": _cola(512, 2e-3, 10_000, "linear"),
        "llama_7b": _cola(1024, 1e-3, 15_000, "linear"),
    },
    # Never published for a language model of this kind: AdamW's rate, the rank that 16-bit factors need for 12 % of
    # what ternary weights take.
    "maestro": {"llama_60m": Published({})},
    "ternarylowrank": {"llama_60m": Published({"rank": 3})},
    "lora": {size: Published({"rank": rank, "alpha": 32, "dropout": 0.05}) for size, rank in _RANKS.items()},
    "relora": {size: _relora(rank) for size, rank in _RANKS.items()} | {"llama_tiny": _relora(64, 25, 5)},
    "loro": {
        "llama_tiny": _loro(64, 0.01, 25),
        "llama_60m": _loro(128, 0.01, 500, 1000),
        "llama_130m": _loro(256, 0.01, 500, 2000),
        "llama_350m": _loro(256, 0.01, 500, 2000),
        "llama_1b": _loro(512, 0.005, 200, 10_000),
    },
}


class LayerSpec(NamedTuple):
    """A parameterization and where it goes.

    Attributes:
        options: the options dataclass.
        targets: of :func:`lowrank_optim.nn.convert`.
        hidden_act: the activation of the MLP, None for the model's own.
    """

    options: Parameterization
    targets: Any = None
    hidden_act: str | None = None


def published(name: str, model: str, hidden_size: int) -> Published:
    """The settings that a model size was published with, or llama_60m's with the rank scaled by the width.

    Raises:
        ValueError: unknown parameterization.
    """
    sizes = PUBLISHED[_known(name)]
    if model in sizes:
        return sizes[model]
    smallest = sizes["llama_60m"]
    if "rank" not in smallest.args:
        return smallest
    rank = max(1, smallest.args["rank"] * hidden_size // _WIDTHS["llama_60m"])
    return smallest._replace(args={**smallest.args, "rank": rank}, max_steps=None, warmup_steps=None)


def layer_spec(name: str, args: Mapping[str, Any]) -> LayerSpec:
    """Options from a name in any case and from keyword arguments.

    Args:
        name: "sltrain", "lost", ...
        args: fields of the options dataclass; ``targets`` and ``hidden_act`` as in :class:`LayerSpec`.

    Raises:
        ValueError: unknown name or argument (the nearest is named), or a value out of range.
    """
    cls = PARAMETERIZATIONS[_known(name)]
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    check_keys(f"argument for {name}", args, [*fields, "targets", "hidden_act"])
    try:
        options = cls(**{key: value for key, value in args.items() if key in fields})
    except TypeError as error:
        raise ValueError(f"Invalid arguments for {name}: {dict(args)} ({error})") from error
    if not isinstance(args.get("hidden_act"), (str, type(None))):
        raise ValueError(f"Invalid hidden_act: {args['hidden_act']!r}, expected the name of an activation")
    return LayerSpec(options, args.get("targets"), args.get("hidden_act"))


def parameterize_(
    model: nn.Module,
    spec: LayerSpec,
    *,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    from_weight: bool = False,
) -> list[str]:
    """Convert ``model`` in place; returns the names of the replaced layers."""
    return convert(model, spec.options, spec.targets, ranks=ranks, seed=seed, from_weight=from_weight)


def build_restarts(
    kind: str, args: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, *, first: int, seed: int
) -> list[Restart]:
    """The callbacks of a run, in the order in which they act.

    Args:
        kind: "none", "reset" (of all moments), "refactorize" (and reset, arXiv 2505.22922), "merge" (ReLoRA) or
            "dropout" (Maestro).
        args: keyword arguments of the callbacks, such as ``every=200``.
        model, optimizer: what they act on.
        first: no restart before this many updates, where ``args`` name no other number.
        seed: of what a merge draws.

    Raises:
        ValueError: an unknown argument (the nearest is named), a value out of range, or a model that the
            callbacks cannot act on.
    """
    if kind == "none":
        check_keys("argument without restarts", args, [])
        return []
    kinds = {"merge": MergeAndRestart, "dropout": OrderedDropout}
    last = kinds.get(kind, MomentumReset)
    accepted = [key for key in inspect.signature(last).parameters if key not in ("model", "optimizer", "seed")]
    check_keys(f"argument for {kind}", args, accepted)
    given = {"first": first, **args}
    if kind in kinds:
        return [kinds[kind](model, optimizer, seed=seed, **given)]
    reset = MomentumReset(model, optimizer, **given)
    if kind == "reset":
        return [reset]
    return [WeightRefactorization(model, every=reset.every, first=reset.first), reset]


def _known(name: str) -> str:
    check_keys("parameterization", [name.lower()], list(PARAMETERIZATIONS))
    return name.lower()
