"""Published hyper-parameters per model size and method: the values of options that are not given.

Sources: the shell scripts of the methods' own repositories (GaLore ``scripts/benchmark_c4``), GaLore's paper,
arXiv 2403.03507, Tables 2 and 5, and that of RACS and Alice, arXiv 2502.07752, Tables 9 to 11. Common to all of them:
512 sequences of 256 tokens per update, warm-up over 10 % of the updates, a cosine to 10 %, no weight decay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lowrank_optim.pretrain.config import OPTIMIZER_OF, Options, Resolved, UserError
from lowrank_optim.pretrain.optimizers import accepted_arguments, parse_optimizer_args
from lowrank_optim.pretrain.parameterizations import RESTARTS, published
from lowrank_optim.pretrain.shards import is_hub_name

# Used by every baseline script of this family whose learning rate is known; GaLore's own grid was
# {1e-2, 5e-3, 1e-3, 5e-4, 1e-4} and its choice was never released.
BASELINE_LR = {"AdamW": 1e-3, "Adam": 1e-3}


class Budget(NamedTuple):
    """What one model size is trained with, whatever the optimizer.

    ``batch_size`` is in sequences per process, ``sequences`` are those of an update over all processes.
    """

    max_steps: int
    batch_size: int
    grad_clip: float = 0.0
    seq_len: int = 256
    sequences: int = 512
    eval_every: int = 1000
    save_every: int = 1000
    evaluated_tokens: int = 10_000_000


class GaLore(NamedTuple):
    lr: float
    rank: int
    update_proj_gap: int = 200
    scale: float = 0.25


BUDGETS = {
    # Ours: a demonstration that ends within minutes on two CPU cores.
    "llama_tiny": Budget(100, 16, 1.0, 128, 16, eval_every=50, save_every=50, evaluated_tokens=30_000),
    "llama_60m": Budget(10_000, 256),
    "llama_130m": Budget(20_000, 256),
    "llama_350m": Budget(60_000, 128),
    "llama_1b": Budget(100_000, 16),
    "llama_7b": Budget(150_000, 8, 1.0),
}
GALORE = {
    "llama_tiny": GaLore(0.01, 64, 50),
    "llama_60m": GaLore(0.01, 128),
    "llama_130m": GaLore(0.01, 256),
    "llama_350m": GaLore(0.01, 256),
    # The paper's Table 2; the repository's script has rank 1024.
    "llama_1b": GaLore(0.01, 512),
    "llama_7b": GaLore(0.005, 1024, 500),
}
# What differs from the defaults of the class: for all sizes, and for one; ranks are GaLore's.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "Alice": {"": {"lr": 0.02}, "llama_1b": {"leading": 160, "scale": 0.25, "compensation": 0.2, "adamw_lr": 7e-4}},
    "FOAM": {"": {"lr": 0.01}},
    "GoLoreAdamW": {"": {"lr": 1e-3}},
    "LoRAPre": {"": {}},
    "RACS": {"": {"lr": 0.02}, "llama_1b": {"scale": 0.02, "adamw_lr": 7e-4}},
    # The small scripts leave the rate of vectors at the command line's default.
    "SCALE": {
        "": {"lr": 1e-3, "adamw_lr": 0.02},
        "llama_1b": {"lr": 2e-4, "adamw_lr": 1e-3},
        "llama_7b": {"lr": 1e-4, "adamw_lr": 1e-3},
    },
}
# The share of a run after which GoLore draws its bases.
GOLORE_SHARE = 0.8


def resolve(options: Options, *, hidden_size: int, processes: int) -> Resolved:
    """Fill what was not given with the published values of the model's size, of parameterization and optimizer.

    A size without published values takes those of llama_60m with rank hidden_size / 4, the ratio of most of
    the published sizes. ``lr`` stays None for optimizers without a published value: their class decides.
    """
    budget = BUDGETS.get(options.model, BUDGETS["llama_60m"])
    values = dataclasses.asdict(options)
    arguments = parse_optimizer_args(options.optimizer_args)

    def default(name: str, value: Any) -> None:
        # A rate or a decay among the optimizer's arguments is given as well.
        if values[name] is None and not (name in ("lr", "weight_decay") and name in arguments):
            values[name] = value

    if options.parameterization is not None:
        _fill_parameterization(options, values, default, hidden_size)
    default("restarts", "none")
    default("pack", not is_hub_name(options.dataset))
    default("accumulate", 1 if options.batch_size else math.ceil(budget.sequences / budget.batch_size / processes))
    for name in ("max_steps", "batch_size", "grad_clip", "seq_len", "eval_every", "save_every"):
        default(name, getattr(budget, name))
    default("warmup_steps", values["max_steps"] // 10)
    default("eval_batches", math.ceil(budget.evaluated_tokens / (values["batch_size"] * values["seq_len"])))
    galore = GALORE.get(options.model) or GALORE["llama_60m"]._replace(rank=max(1, hidden_size // 4))
    rest: dict[str, Any] = {}
    if options.optimizer.startswith("GaLore"):
        rest = galore._asdict()
    elif options.optimizer in METHODS:
        sizes = METHODS[options.optimizer]
        own = {"rank": galore.rank, "random_from": round(GOLORE_SHARE * values["max_steps"])}
        accepted = accepted_arguments(options.optimizer)
        rest = {
            **{key: value for key, value in own.items() if key in accepted},
            **sizes[""],
            **sizes.get(options.model, {}),
        }
    default("lr", rest.pop("lr", None))
    _add_pairs(values, "optimizer_args", rest)
    default("lr", BASELINE_LR.get(options.optimizer))
    if "weight_decay" in accepted_arguments(options.optimizer):
        default("weight_decay", 0.0)
    if values["warmup_steps"] > values["max_steps"]:
        raise UserError(
            f"Invalid warmup_steps: {values['warmup_steps']}, expected at most max_steps = {values['max_steps']}"
        )
    if values["seq_len"] < 2:
        raise UserError(f"Invalid seq_len: {values['seq_len']}, expected at least 2, a token and its successor")
    return Resolved(**values)


def _fill_parameterization(
    options: Options, values: dict[str, Any], default: Callable[[str, Any], None], hidden_size: int
) -> None:
    name = str(options.parameterization)
    recipe = published(name, options.model, hidden_size)
    _add_pairs(values, "parameterization_args", recipe.args)
    if options.max_steps is None:
        # A warm-up belongs to the length of its run.
        default("warmup_steps", recipe.warmup_steps)
    default("max_steps", recipe.max_steps)
    default("grad_clip", recipe.grad_clip)
    own = OPTIMIZER_OF.get(name, "AdamW")
    if own == options.optimizer:
        _add_pairs(values, "optimizer_args", recipe.optimizer_args)
    if options.optimizer.startswith(own.removesuffix("W")):
        default("lr", recipe.lr)
        default("weight_decay", recipe.weight_decay)
    if options.restarts is None and name in RESTARTS:
        values["restarts"] = RESTARTS[name]
        _add_pairs(values, "restart_args", recipe.restart_args)


def _add_pairs(values: dict[str, Any], key: str, published_args: Mapping[str, Any]) -> None:
    """Append the published arguments that are not given to the pairs under ``key``."""
    given = parse_optimizer_args(values[key], key.removesuffix("_args"))
    values[key] = [*values[key], *(f"{k}={v}" for k, v in published_args.items() if k not in given)]
