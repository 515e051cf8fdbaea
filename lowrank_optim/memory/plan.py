"""``lowrank-memory plan``: the fastest way to train a model that fits a GPU."""

from __future__ import annotations

import copy
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from lowrank_optim.memory.estimate import init_state_
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.memory.tracker import Peak
from lowrank_optim.ops.linear_cross_entropy import CHUNK
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.command_line import write_flags
from lowrank_optim.pretrain.llama import build_config
from lowrank_optim.pretrain.optimizers import (
    accepted_arguments,
    low_rank_names,
    optimizer_names,
    parse_optimizer_args,
)
from lowrank_optim.pretrain.report import flops_per_token
from lowrank_optim.pretrain.sizes import tensor_bytes

# CUDA's context, and 3 % for what the allocator cannot use.
CONTEXT, FRAGMENTATION = 0.6e9, 0.03
# How many FLOPs a GPU makes in the time of one byte of memory traffic: 156 on an A100, 165 on an RTX 4090.
BALANCE = 160
# Plans whose costs differ by less than this are equally fast.
TIE = 0.02
# Updates between two refreshes, where the method has a choice.
GAP = 200
EVERY_UPDATE = ("Trion", "LDAdamW")
STATES = ("float32", "bfloat16", "int8")
WEIGHTS = ("bf16", "int8")

COST_MODEL = f"""Cost of an update of N tokens, in FLOPs; W matrices, H head, r rank; a byte of traffic is {BALANCE}:
  forward, backward   6 (W + H) N + attention, 2 H N for the logits that are computed twice
  checkpointing       2 W N + attention / 3
  projection          2 W r down, as often as there are gradients to be summed at low rank, and 2 W r up
  refresh             6 W r (DCT: 5 W log2(side)), divided by the gap
  whole matrices      30 W side (Muon), 16 W r (LoRAPre), in place of projection and refresh
  traffic             weights in each pass (int8: 5 bytes a value, else 2), gradients twice a micro-batch,
                      weights and states twice an update
Plans within {TIE:.0%} count as equally fast; among them the highest rank wins, then the widest states and weights."""


@dataclass(frozen=True)
class Profile:
    """Bytes of one optimizer on one model, and what its cost depends on."""

    weights: int
    optimizer: int
    gradients: int
    largest_gradient: int
    # Bytes of the bf16 sums of low-rank gradients over micro-batches, and of the gradients that are summed whole.
    sums: int
    whole: int


@dataclass(frozen=True)
class Plan:
    """A job, its cost in FLOPs an update, and the bytes that it is predicted to take."""

    job: Job
    cost: float
    predicted_bytes: int
    peak: Peak | None = None

    def as_dict(self) -> dict[str, Any]:
        peak = self.peak.as_dict() if self.peak is not None else {}
        return {**self.job.as_dict(), "cost": self.cost, "predicted_bytes": self.predicted_bytes, **peak}


def parse_size(text: str) -> int:
    """Bytes of "24GB" or "22.5GiB".

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if match is None:
        raise ValueError(f"Invalid --gpu: {text!r}, expected a size such as 24GB or 22.5GiB")
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 2**30))


def search(
    model: str, gpu_bytes: int, *, tokens: int, seq_len: int, optimizers: Sequence[str] = ()
) -> tuple[Plan | None, list[Plan]]:
    """The fastest plan whose simulated peak fits, and the fastest of each optimizer that is predicted to fit.

    Args:
        model: a preset or a path.
        gpu_bytes: memory of the GPU; what CUDA itself takes is set aside.
        tokens: per update.
        seq_len: tokens per sequence.
        optimizers: only these.

    Raises:
        ValueError: fewer tokens than a sequence has, or an unknown optimizer.
    """
    if tokens < seq_len:
        raise ValueError(f"Invalid --tokens: {tokens}, expected at least one sequence of {seq_len}")
    room = available(gpu_bytes)
    plans = [plan for plan in _plans(model, tokens, seq_len, optimizers or _known()) if plan.predicted_bytes <= room]
    plans.sort(key=_order)
    best_of = list({plan.job.optimizer: plan for plan in reversed(plans)}.values())
    best_of.sort(key=_order)
    while plans:
        plan = plans[0]
        peak = simulate(plan.job)
        if peak.peak_bytes <= room:
            return replace(plan, peak=peak), best_of
        # What is predicted to take as much does not fit either.
        plans = [other for other in plans if other.predicted_bytes < 0.97 * plan.predicted_bytes]
    return None, best_of


def available(gpu_bytes: int) -> int:
    """Bytes of GPU memory left for tensors."""
    return int((gpu_bytes - CONTEXT) * (1 - FRAGMENTATION))


def command_line(job: Job) -> str:
    """The command that runs a job."""
    return shlex.join(["python", "train_llama.py", *write_flags(job, MEMORY_OPTIONS)])


def _known() -> list[str]:
    return [name for name in ("AdamW", "AdamW8bit") if name in optimizer_names()] + low_rank_names()


def _order(plan: Plan) -> tuple[Any, ...]:
    args, own = parse_optimizer_args(plan.job.optimizer_args), plan.job.optimizer in low_rank_names()
    rank = args.get("rank", 1) if own else math.inf
    state = STATES.index(args.get("state_dtype", "float32"))
    return (round(math.log(plan.cost) / math.log1p(TIE)), -rank, state, plan.job.weights == "int8", plan.cost)


def _plans(model: str, tokens: int, seq_len: int, optimizers: Sequence[str]) -> Iterator[Plan]:
    config = build_config(model)
    sequences = tokens // seq_len
    micro_batches = [2**i for i in range(sequences.bit_length()) if sequences % 2**i == 0]
    weight_bytes = {weights: _weight_bytes(model, weights) for weights in WEIGHTS}
    for name in optimizers:
        own, accepted = name in low_rank_names(), accepted_arguments(name)
        ranked = "rank" in accepted and name != "APOLLOMini"
        ranks = [config.hidden_size // part for part in (4, 8, 16)] if ranked else [None]
        states = STATES if "state_dtype" in accepted else (None,)
        for rank, state in product(ranks, states):
            args: dict[str, Any] = {"rank": rank, "state_dtype": state}
            args = {key: value for key, value in args.items() if value is not None}
            if name == "DCTAdamW":
                # Its default, a selection at every update, needs the whole gradient.
                args["update_proj_gap"] = GAP
            profile = _profile(config, Job(model=model, optimizer=name, optimizer_args=args, seq_len=seq_len))
            for weights, size, per_layer, checkpointing in product(
                WEIGHTS if own else ("bf16",), micro_batches, (False, True) if own else (False,), (False, True)
            ):
                job = Job(
                    model=model, optimizer=name, optimizer_args=args, weights=weights, batch_size=size,
                    seq_len=seq_len, accumulate=sequences // size, accumulate_dtype="bf16", per_layer=per_layer,
                    checkpointing=checkpointing,
                )  # fmt: skip
                this = replace(profile, weights=weight_bytes[weights])
                yield Plan(job, _cost(config, job, this), _bytes(config, job, this))


def _weight_bytes(model: str, weights: str) -> int:
    # Which optimizer it is makes no difference, but int8 weights need one of ours.
    _, _, network, optimizer = build(Job(model=model, optimizer="GaLoreAdamW", weights=weights), "meta")
    return tensor_bytes(network, optimizer)["weights"]


def _profile(config: Any, job: Job) -> Profile:
    """From models of one and of two layers: everything is linear in their number."""
    one, two = (_profile_of(config, job, layers) for layers in (1, 2))
    more = config.num_hidden_layers - 1
    grown = {key: value + more * (vars(two)[key] - value) for key, value in vars(one).items()}
    return Profile(**{**grown, "largest_gradient": one.largest_gradient})


def _profile_of(config: Any, job: Job, layers: int) -> Profile:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    built: Any = build(job, "meta", config=config)
    _, _, network, optimizer = built
    for p in network.parameters():
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
    init_state_(optimizer)
    sizes = tensor_bytes(network, optimizer)
    sums = whole = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, LowRankOptimizer) and optimizer.accumulates(p, group):
                sums += 2 * max(p.shape) * group["rank"]
            else:
                whole += p.grad.nbytes
    return Profile(
        weights=sizes["weights"],
        optimizer=sum(sizes["optimizer"].values()),
        gradients=sizes["gradients"],
        largest_gradient=max(p.grad.nbytes for p in network.parameters()),
        sums=sums,
        whole=whole,
    )


def _bytes(config: Any, job: Job, profile: Profile) -> int:
    """Closed form of the peak; the activations' coefficients are those of transformers' LLaMA in bf16."""
    tokens, hidden, inner = job.batch_size * job.seq_len, config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    if job.checkpointing:
        activations = tokens * (2 * hidden * layers + 37 * hidden + 12 * inner)
    else:
        activations = tokens * (layers * (24 * hidden + 8 * inner) + 25 * hidden)
    if not job.per_layer:
        gradients = profile.gradients
    elif job.accumulate == 1:
        gradients = profile.largest_gradient
    else:
        gradients = profile.sums + profile.whole
    # The loss takes fp32 logits, their gradient, and both in bf16, beside the gradient of the head; an update takes
    # about as much for itself as the largest gradient.
    loss = 10 * min(tokens, CHUNK) * config.vocab_size
    return int(profile.weights + profile.optimizer + activations + profile.largest_gradient + max(gradients, loss))


def _cost(config: Any, job: Job, profile: Profile) -> float:
    tokens = job.batch_size * job.accumulate * job.seq_len
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = config.vocab_size * hidden
    matrices = layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    attention = 6.0 * layers * hidden * job.seq_len
    flops = tokens * (flops_per_token(config, matrices + 2 * head, job.seq_len) + 2.0 * head)
    if job.checkpointing:
        flops += tokens * (2.0 * matrices + attention / 3)
    if job.optimizer in low_rank_names():
        rank = parse_optimizer_args(job.optimizer_args).get("rank", 1)
        downs = job.accumulate if job.per_layer and profile.sums else 1
        refresh = 5 * math.log2(hidden) if job.optimizer in ("DCTAdamW", "Trion") else 6.0 * rank
        low_rank = 2.0 * rank * (downs + 1) + refresh / (1 if job.optimizer in EVERY_UPDATE else GAP)
        flops += matrices * {"Muon": 30.0 * hidden, "LoRAPre": 16.0 * rank}.get(job.optimizer, low_rank)
    passes = 3 if job.checkpointing else 2
    traffic = job.accumulate * passes * (matrices * (5 if job.weights == "int8" else 2) + 2 * head)
    traffic += job.accumulate * 2 * profile.gradients + 2 * (profile.weights + profile.optimizer)
    return flops + BALANCE * traffic
