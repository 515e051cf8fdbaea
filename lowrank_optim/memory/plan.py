"""``lowrank-memory plan``: the fastest way to train a model that fits a GPU."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.memory.estimate import init_state_, low_rank_sums, table_bytes
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.simulate import layers_of, simulate, with_layers
from lowrank_optim.memory.tracker import Peak
from lowrank_optim.ops.linear_cross_entropy import CHUNK
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.build import build_network, settle
from lowrank_optim.pretrain.command_line import write_flags
from lowrank_optim.pretrain.llama import build_config
from lowrank_optim.pretrain.optimizers import (
    accepted_arguments,
    build_optimizer,
    low_rank_names,
    optimizer_names,
)
from lowrank_optim.pretrain.report import flops_per_token
from lowrank_optim.pretrain.sizes import storage_bytes

# The memory that data sheets name, in GB. Of 2^30 bytes they would be more than error correction and driver leave.
CARDS = {
    "B200": 180, "H200": 141, "H100": 80, "GH200": 96, "A100 80GB": 80, "A100": 40, "L40S": 48, "L40": 48, "A40": 48,
    "L4": 24, "A10": 24, "T4": 16, "V100 32GB": 32, "V100": 16, "P100": 16, "RTX 6000 Ada": 48, "RTX A6000": 48,
    "RTX A5000": 24, "RTX 5090": 32, "RTX 5080": 16, "RTX 5070 Ti": 16, "RTX 5070": 12, "RTX 4090": 24, "RTX 4080": 16,
    "RTX 4070 Ti": 12, "RTX 4070": 12, "RTX 4060 Ti 16GB": 16, "RTX 4060": 8, "RTX 3090": 24, "RTX 3080": 10,
    "RTX 3060": 12, "RTX 2080 Ti": 11, "Titan RTX": 24, "MI300X": 192, "MI250X": 128, "MI210": 64,
}  # fmt: skip
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
    # Bytes of the bf16 sums of low-rank gradients over micro-batches, what a refresh of one matrix adds to them, and of
    # the gradients that are summed whole.
    sums: int
    refresh: int
    whole: int


@dataclass(frozen=True)
class Plan:
    """A job, its cost in FLOPs per update, the bytes that it is predicted to take, and where it stands among others."""

    job: Job
    cost: float
    predicted_bytes: int
    order: tuple[Any, ...]
    peak: Peak | None = None

    def as_dict(self) -> dict[str, Any]:
        peak = self.peak.as_dict() if self.peak is not None else {}
        return {**self.job.as_dict(), "cost": self.cost, "predicted_bytes": self.predicted_bytes, **peak}


class Found(NamedTuple):
    """What a search found.

    Attributes:
        best: the fastest plan that fits, or None.
        best_of: the fastest that fits of each optimizer.
        next: the smallest of the plans that are faster or keep more, and do not fit; of all where none fits.
    """

    best: Plan | None
    best_of: list[Plan]
    next: Plan | None


def parse_size(text: str) -> int:
    """Bytes of "24GB", "22.5GiB", "24" (GB) or the name of a card, such as "RTX 4090".

    Raises:
        ValueError: another form.
    """
    name = re.sub(r"[\s_-]|nvidia|geforce|amd|instinct", "", text.lower())
    for card, size in CARDS.items():
        if name in (key := card.lower().replace(" ", ""), key.removeprefix("rtx")):
            return size * 10**9
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|)", text.strip(), re.IGNORECASE)
    if match is not None and float(match[1]):
        return int(float(match[1]) * (2**30 if match[2].lower() == "gib" else 10**9))
    near = difflib.get_close_matches(name, {key.lower().replace(" ", ""): key for key in CARDS}, n=1, cutoff=0.5)
    hint = f"; did you mean {next(c for c in CARDS if c.lower().replace(' ', '') == near[0])}?" if near else ""
    raise ValueError(
        f"Invalid --gpu: {text!r}, expected a size such as 24, 24GB or 22.5GiB, or {', '.join(CARDS)}{hint}"
    )


def search(
    model: str,
    gpu_bytes: int,
    *,
    tokens: int,
    seq_len: int,
    optimizers: Sequence[str] = (),
    check: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The fastest plan that is predicted to fit, the fastest of each optimizer, and what would fit next.

    Args:
        model: a preset or a path.
        gpu_bytes: memory of the GPU; what CUDA itself takes is set aside.
        tokens: per update.
        seq_len: tokens per sequence.
        optimizers: only these.
        check: simulate the plan, and take the next one where its simulated peak does not fit.
        progress: gets the name of each optimizer before its plans are made.

    Raises:
        ValueError: fewer tokens than a sequence has, or an unknown optimizer.
    """
    if tokens < seq_len:
        raise ValueError(f"Invalid --tokens: {tokens}, expected at least one sequence of {seq_len}")
    room = available(gpu_bytes)
    every = sorted(_plans(model, tokens, seq_len, optimizers or _known(), progress), key=lambda plan: plan.order)
    plans = [plan for plan in every if plan.predicted_bytes <= room]
    best_of = sorted({plan.job.optimizer: plan for plan in reversed(plans)}.values(), key=lambda plan: plan.order)
    best = plans[0] if plans else None
    while check and plans:
        progress("simulating the plan")
        best = replace(plans[0], peak=simulate(plans[0].job))
        if best.peak is not None and best.peak.peak_bytes <= room:
            break
        # What is predicted to take as much does not fit either.
        plans = [plan for plan in plans if plan.predicted_bytes < 0.97 * best.predicted_bytes]
        best = plans[0] if plans else None
    better = [plan for plan in every if plan.predicted_bytes > room and (best is None or plan.order < best.order)]
    return Found(best, best_of, min(better, key=lambda plan: (plan.predicted_bytes, plan.order), default=None))


def needed(tensor_bytes: int) -> int:
    """Bytes of GPU memory that tensors want: the inverse of :func:`available`."""
    return math.ceil(tensor_bytes / (1 - FRAGMENTATION) + CONTEXT)


def available(gpu_bytes: int) -> int:
    """Bytes of GPU memory left for tensors."""
    return int((gpu_bytes - CONTEXT) * (1 - FRAGMENTATION))


def command_line(job: Job) -> str:
    """The command that runs a job."""
    return shlex.join(["lowrank-train", *write_flags(job, MEMORY_OPTIONS)])


def _known() -> list[str]:
    return [name for name in ("AdamW", "AdamW8bit") if name in optimizer_names()] + low_rank_names()


def _order(cost: float, rank: float, state: str | None, weights: str) -> tuple[Any, ...]:
    """Cheap first; among equals the highest rank, full rank first of all, then the widest states and weights."""
    return (round(math.log(cost) / math.log1p(TIE)), -rank, STATES.index(state or "float32"), weights == "int8", cost)


def _plans(
    model: str, tokens: int, seq_len: int, optimizers: Sequence[str], progress: Callable[[str], None]
) -> Iterator[Plan]:
    config = build_config(model)
    sequences = tokens // seq_len
    micro_batches = [2**i for i in range(sequences.bit_length()) if sequences % 2**i == 0]
    weight_bytes = {}
    # The network in bf16 last: the profiles are taken of it.
    for weights in reversed(WEIGHTS):
        run, small = settle(Job(model=model, optimizer="GaLoreAdamW", weights=weights, seq_len=seq_len), config=config)
        network = build_network(run, with_layers(small, 1), "meta")
        weight_bytes[weights] = _weight_bytes(network, config.num_hidden_layers)
    for number, name in enumerate(optimizers, 1):
        progress(f"{name} ({number} of {len(optimizers)})")
        own, accepted = name in low_rank_names(), accepted_arguments(name)
        ranked = "rank" in accepted and name != "APOLLOMini"
        ranks = [config.hidden_size // part for part in (4, 8, 16)] if ranked else [None]
        states = STATES if "state_dtype" in accepted and not name.endswith("8bit") else (None,)
        for rank, state in product(ranks, states):
            args: dict[str, Any] = {"rank": rank, "state_dtype": state}
            args = {key: value for key, value in args.items() if value is not None}
            if name == "DCTAdamW":
                # Its default, a selection at every update, needs the whole gradient.
                args["update_proj_gap"] = GAP
            profile = _profile(config, network, name, args)
            for weights in WEIGHTS if own else ("bf16",):
                this = replace(profile, weights=weight_bytes[weights])
                for size, per_layer, checkpointing in product(
                    micro_batches, (False, True) if own else (False,), (False, True)
                ):
                    # Staggered refreshes come one after the other, and so do the sums that they take.
                    sums = per_layer and size < sequences and profile.sums
                    options = {**args, "stagger": True} if sums else args
                    job = Job(
                        model=model, optimizer=name, optimizer_args=options, weights=weights, batch_size=size,
                        seq_len=seq_len, accumulate=sequences // size, accumulate_dtype="bf16", per_layer=per_layer,
                        checkpointing=checkpointing,
                    )  # fmt: skip
                    cost = _cost(config, job, rank or 1, this)
                    order = _order(cost, (rank or 1) if own else math.inf, state, weights)
                    yield Plan(job, cost, _bytes(config, job, this), order)


def _weight_bytes(network: Any, layers: int) -> int:
    """Bytes of a model of so many layers, from one of a single layer."""
    layer = layers_of(network, 1)
    seen: set[int] = set()
    return sum(
        (layers if path.startswith(f"{layer}.") else 1) * storage_bytes([tensor], seen)
        for path, tensor in network.state_dict(keep_vars=True).items()
    )


def _profile(config: Any, network: Any, name: str, args: Mapping[str, Any]) -> Profile:
    """From a model of one layer: everything else is there once, and a layer as often as there are layers."""
    optimizer = build_optimizer(name, network, args=args)
    layer = layers_of(network, 1)
    count = {
        p: config.num_hidden_layers if path.startswith(f"{layer}.") else 1 for path, p in network.named_parameters()
    }
    for p in count:
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
    init_state_(optimizer)
    state = sum(table_bytes(optimizer).values())
    for p, number in count.items():
        tensors = [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
        state += number * storage_bytes(tensors)
    gradients = {p: p.grad.nbytes for p in count if p.grad is not None}
    summed = dict(low_rank_sums(optimizer, torch.bfloat16)) if isinstance(optimizer, LowRankOptimizer) else {}
    return Profile(
        weights=0,
        optimizer=state,
        gradients=sum(count[p] * size for p, size in gradients.items()),
        largest_gradient=max(gradients.values()),
        sums=sum(count[p] * sums.low for p, sums in summed.items()),
        refresh=max((sums.late + max(sums.sketches) for sums in summed.values()), default=0),
        whole=sum(count[p] * size for p, size in gradients.items() if p not in summed),
    )


def _bytes(config: Any, job: Job, profile: Profile) -> int:
    """Closed form of the peak; the activations' coefficients are those of transformers' LLaMA in bf16."""
    tokens, hidden, inner = job.batch_size * job.seq_len, config.hidden_size, _inner(config)
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
        gradients = profile.sums + profile.refresh + profile.whole
    # The loss takes fp32 logits, their gradient, and both in bf16, beside the gradient of the head; an update takes
    # about as much for itself as the largest gradient.
    loss = 10 * min(tokens, CHUNK) * config.vocab_size
    return int(profile.weights + profile.optimizer + activations + profile.largest_gradient + max(gradients, loss))


def _inner(config: Any) -> int:
    """The width of the MLP, by the names that it has."""
    fields = config.to_dict()
    return fields.get("intermediate_size") or fields.get("ffn_dim") or fields.get("n_inner") or 4 * config.hidden_size


def _cost(config: Any, job: Job, rank: int, profile: Profile) -> float:
    tokens = job.batch_size * job.accumulate * job.seq_len
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = config.vocab_size * hidden
    matrices = layers * (4 * hidden**2 + 3 * hidden * _inner(config))
    attention = 6.0 * layers * hidden * job.seq_len
    flops = tokens * (flops_per_token(config, matrices + 2 * head, job.seq_len) + 2.0 * head)
    if job.checkpointing:
        flops += tokens * (2.0 * matrices + attention / 3)
    if job.optimizer in low_rank_names():
        downs = job.accumulate if job.per_layer and profile.sums else 1
        refresh = 5 * math.log2(hidden) if job.optimizer in ("DCTAdamW", "Trion") else 6.0 * rank
        low_rank = 2.0 * rank * (downs + 1) + refresh / (1 if job.optimizer in EVERY_UPDATE else GAP)
        flops += matrices * {"Muon": 30.0 * hidden, "LoRAPre": 16.0 * rank}.get(job.optimizer, low_rank)
    passes = 3 if job.checkpointing else 2
    traffic = job.accumulate * passes * (matrices * (5 if job.weights == "int8" else 2) + 2 * head)
    traffic += job.accumulate * 2 * profile.gradients + 2 * (profile.weights + profile.optimizer)
    return flops + BALANCE * traffic
