"""``lowrank-memory plan``: the fastest way to train a model that fits a GPU, or each of several."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank_optim.memory.devices import ALONE, STRATEGIES, Devices, Footprint, footprint_of
from lowrank_optim.memory.estimate import low_rank_sums
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.outline import Outline
from lowrank_optim.memory.simulate import layers_of, simulate, with_layers
from lowrank_optim.memory.tracker import Peak
from lowrank_optim.nn import quantize_weights
from lowrank_optim.ops.linear_cross_entropy import CHUNK
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.validation import nearest
from lowrank_optim.pretrain.build import build_network, settle
from lowrank_optim.pretrain.command_line import write_flags
from lowrank_optim.pretrain.llama import PRESETS, build_config
from lowrank_optim.pretrain.optimizers import accepted_arguments, build_optimizer, low_rank_names
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
# And of one byte that is sent to another GPU: 312 TFLOP/s and 300 GB/s in each direction, an A100 with NVLink.
LINK = 1040
# Plans whose costs differ by less than this are equally fast.
TIE = 0.02
# Updates between two refreshes, where the method has a choice.
GAP = 200
EVERY_UPDATE = ("Trion", "LDAdamW")
STATES = ("float32", "bfloat16", "int8")
# What torch and bitsandbytes keep is what ours keep without a rank, and ours are made in a fraction of the time.
WITHOUT_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("GaLoreAdamW", {"rank": None, "state_dtype": "bfloat16"}),
    "AdamW8bit": ("GaLoreAdamW8bit", {"rank": None}),
}
WEIGHTS = ("bf16", "int8")

COST_MODEL = f"""Cost of an update of N tokens, in FLOPs; W matrices, H head, r rank; a byte of traffic is {BALANCE},
one sent to another device {LINK}:
  forward, backward   6 (W + H) N + attention, 2 H N for the logits that are computed twice
  checkpointing       2 W N + attention / 3
  projection          2 W r down, as often as there are gradients to be summed at low rank, and 2 W r up
  refresh             6 W r (DCT: 5 W log2(side)), divided by the gap
  whole matrices      30 W side (Muon), 16 W r (LoRAPre), in place of projection and refresh
  traffic             weights in each pass (int8: 5 bytes a value, else 2), gradients twice a micro-batch,
                      weights and states twice an update
  devices             all of this for one of them, and what it sends, none of it behind computation
Plans within {TIE:.0%} count as equally fast; among them the highest rank wins, then the widest states and weights."""


class Sizes(NamedTuple):
    """Of a configuration, whose own attributes take a hundred times as long to read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int


@dataclass(frozen=True)
class Profile:
    """Bytes of one optimizer on one model, and what its cost depends on."""

    weights: int
    largest_gradient: int
    # Bytes of the bf16 sums of low-rank gradients over micro-batches, what a refresh of one matrix adds to them, and of
    # the gradients that are summed whole.
    sums: int
    refresh: int
    whole: int
    device: Footprint


@dataclass(frozen=True)
class Plan:
    """A job of one device, its cost in FLOPs per update, its predicted bytes, and where it stands among others.

    sent_bytes: what a device sends to others in an update, in the mean over refreshes.
    """

    job: Job
    cost: float
    predicted_bytes: int
    order: tuple[Any, ...]
    peak: Peak | None = None
    devices: Devices = ALONE
    sent_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        peak = asdict(self.peak) if self.peak is not None else {}
        found = {**self.job.as_dict(), "cost": self.cost, "predicted_bytes": self.predicted_bytes, **peak}
        several = {"devices": self.devices.number, "strategy": self.devices.strategy, "sent_bytes": self.sent_bytes}
        return found | (several if self.devices.number > 1 else {})


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
    raise ValueError(
        f"Invalid --gpu: {text!r}, expected a size such as 24, 24GB or 22.5GiB, or {', '.join(CARDS)}"
        + nearest(name, CARDS, cutoff=0.5)
    )


def search(
    model: str,
    gpu_bytes: int,
    *,
    tokens: int,
    seq_len: int,
    optimizers: Sequence[str] = (),
    devices: int = 1,
    strategies: Sequence[str] = STRATEGIES,
    check: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """The fastest plan that is predicted to fit, the fastest of each optimizer, and what would fit next.

    Args:
        model: a preset or a path.
        gpu_bytes: memory of a GPU; what CUDA itself takes is set aside.
        tokens: per update.
        seq_len: tokens per sequence.
        optimizers: only these.
        devices: how many GPUs share the tokens of an update.
        strategies: how they do, of several.
        check: simulate the plan, and take the next one where its simulated peak does not fit.
        progress: gets the name of each optimizer before its plans are made.

    Raises:
        ValueError: fewer tokens than a sequence has, an unknown optimizer, sequences that the devices cannot share
            alike, or a simulation of parts of a model.
    """
    if tokens < seq_len:
        raise ValueError(f"Invalid --tokens: {tokens}, expected at least one sequence of {seq_len}")
    if tokens // seq_len % devices:
        raise ValueError(
            f"Invalid --tokens: {tokens}, expected as many sequences of {seq_len} on each of {devices} devices"
        )
    if check and devices > 1 and "fsdp" in strategies:
        raise ValueError("Invalid --simulate: with --strategy fsdp, expected --strategy ddp or one device")
    for name in optimizers:
        # An unknown one is known before any plan is made.
        accepted_arguments(name)
    room = available(gpu_bytes)
    every: list[Plan] = []
    for strategy in strategies if devices > 1 else strategies[:1]:
        spread = Devices(devices, strategy)
        names = optimizers or _known(spread)
        every += _plans(model, tokens // devices, seq_len, names, progress, spread)
    every.sort(key=lambda plan: plan.order)
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


def command_line(job: Job, devices: Devices = ALONE) -> str:
    """The command that runs a job, on every node of eight devices."""
    words = ["lowrank-train", *write_flags(job, MEMORY_OPTIONS)]
    if devices.number > 1:
        nodes = ["--nnodes", str(-(-devices.number // 8))] if devices.number > 8 else []
        words = ["torchrun", *nodes, "--nproc_per_node", str(min(devices.number, 8)), "--no-python", *words]
        words += ["--fsdp"] if devices.splits else []
    return shlex.join(words)


def _known(devices: Devices) -> list[str]:
    # Not imported: its import takes half as long as a plan.
    eight_bit = ["AdamW8bit"] if not devices.splits and importlib.util.find_spec("bitsandbytes") else []
    return ["AdamW", *eight_bit, *low_rank_names()]


def _order(cost: float, rank: float, state: str | None, weights: str) -> tuple[Any, ...]:
    """Cheap first; among equals the highest rank, full rank first of all, then the widest states and weights."""
    return (round(math.log(cost) / math.log1p(TIE)), -rank, STATES.index(state or "float32"), weights == "int8", cost)


def _plans(
    model: str, tokens: int, seq_len: int, optimizers: Sequence[str], progress: Callable[[str], None],
    devices: Devices = ALONE,
) -> Iterator[Plan]:  # fmt: skip
    sizes, networks = _networks(model, seq_len)
    sequences = tokens // seq_len
    micro_batches = [2**i for i in range(sequences.bit_length()) if sequences % 2**i == 0]
    weight_bytes = {weights: _weight_bytes(network, sizes.num_hidden_layers) for weights, network in networks.items()}
    network = networks["bf16"]
    for number, name in enumerate(optimizers, 1):
        progress(f"{name} ({number} of {len(optimizers)})")
        own = name in low_rank_names()
        of_ours, without_rank = WITHOUT_RANK.get(name, (name, {}))
        accepted = accepted_arguments(name) if name == of_ours else []
        ranked = "rank" in accepted and name != "APOLLOMini"
        ranks = [sizes.hidden_size // part for part in (4, 8, 16)] if ranked else [None]
        states = STATES if "state_dtype" in accepted and not name.endswith("8bit") else (None,)
        for rank, state in product(ranks, states):
            args: dict[str, Any] = {"rank": rank, "state_dtype": state}
            args = {key: value for key, value in args.items() if value is not None}
            if name == "DCTAdamW":
                # Its default, a selection at every update, needs the whole gradient.
                args["update_proj_gap"] = GAP
            profile = _profile(sizes, network, of_ours, args or without_rank, devices)
            whole = own and not devices.splits
            for weights in WEIGHTS if whole else ("bf16",):
                this = profile if devices.splits else replace(profile, weights=weight_bytes[weights])
                for size, per_layer, checkpointing in product(
                    micro_batches, (False, True) if whole else (False,), (False, True)
                ):
                    # Staggered refreshes come one after the other, and so do the sums that they take.
                    sums = per_layer and size < sequences and profile.sums
                    options = {**args, "stagger": True} if sums else args
                    job = Job(
                        model=model, optimizer=name, optimizer_args=options, weights=weights, batch_size=size,
                        seq_len=seq_len, accumulate=sequences // size, accumulate_dtype="bf16", per_layer=per_layer,
                        checkpointing=checkpointing,
                    )  # fmt: skip
                    cost = _cost(sizes, job, rank or 1, this, devices, own=own)
                    order = _order(cost, (rank or 1) if own else math.inf, state, weights)
                    sent = this.device.sent(devices, job.accumulate)
                    yield Plan(job, cost, _bytes(sizes, job, this), order, devices=devices, sent_bytes=sent)


def _networks(model: str, seq_len: int) -> tuple[Sizes, dict[str, nn.Module]]:
    """The sizes of a model, and a single layer of it with weights of each kind on the meta device."""
    networks: dict[str, nn.Module]
    if shape := PRESETS.get(model):
        if seq_len > shape.positions:
            raise ValueError(f"Invalid --seq-len: {seq_len}, expected at most {shape.positions} for {model}")
        networks = {weights: Outline(shape, torch.bfloat16) for weights in WEIGHTS}
        quantize_weights(networks["int8"])
        return Sizes(shape.hidden, shape.intermediate, shape.layers, shape.vocab), networks
    config = build_config(model)
    networks = {}
    for weights in WEIGHTS:
        run, small = settle(Job(model=model, optimizer="GaLoreAdamW", weights=weights, seq_len=seq_len), config=config)
        networks[weights] = build_network(run, with_layers(small, 1), "meta")
    return Sizes(config.hidden_size, _inner(config), config.num_hidden_layers, config.vocab_size), networks


def _weight_bytes(network: Any, layers: int) -> int:
    """Bytes of a model of so many layers, from one of a single layer."""
    layer = layers_of(network, 1)
    seen: set[int] = set()
    return sum(
        (layers if path.startswith(f"{layer}.") else 1) * storage_bytes([tensor], seen)
        for path, tensor in network.state_dict(keep_vars=True).items()
    )


def _profile(sizes: Sizes, network: Any, name: str, args: Mapping[str, Any], devices: Devices) -> Profile:
    """From a model of one layer: everything else is there once, and a layer as often as there are layers."""
    optimizer = build_optimizer(name, network, args=args)
    found = footprint_of(network, optimizer, sizes.num_hidden_layers, devices)
    layer = layers_of(network, 1)
    count = {
        p: sizes.num_hidden_layers if path.startswith(f"{layer}.") else 1 for path, p in network.named_parameters()
    }
    gradients = {p: p.grad.nbytes for p in count if p.grad is not None}
    summed = dict(low_rank_sums(optimizer, torch.bfloat16)) if isinstance(optimizer, LowRankOptimizer) else {}
    return Profile(
        weights=found.weights,
        largest_gradient=max(gradients.values()) // (devices.number if devices.splits else 1),
        sums=sum(count[p] * sums.low for p, sums in summed.items()),
        refresh=max((sums.late + max(sums.sketches) for sums in summed.values()), default=0),
        whole=sum(count[p] * size for p, size in gradients.items() if p not in summed),
        device=found,
    )


def _bytes(sizes: Sizes, job: Job, profile: Profile) -> int:
    """Closed form of the peak; the activations' coefficients are those of transformers' LLaMA in bf16."""
    tokens = job.batch_size * job.seq_len
    hidden, inner, layers, vocabulary = sizes
    # What the loss finds, and what the layers make in their turn.
    stay, come = layers * (24 * hidden + 8 * inner), 25 * hidden
    if job.checkpointing:
        stay, come = 2 * hidden * layers, 37 * hidden + 12 * inner
    if not job.per_layer:
        held, late = profile.device.gradients, 0
    elif job.accumulate == 1:
        held, late = profile.largest_gradient, 0
    else:
        held, late = profile.sums + profile.whole, profile.refresh
    # The loss takes fp32 logits, their gradient, and both in bf16, beside the gradient of the head and sums of earlier
    # micro-batches; an update takes about as much for itself as the largest gradient.
    loss = tokens * stay + 10 * min(tokens, CHUNK) * vocabulary
    loss += held if job.accumulate > 1 else profile.largest_gradient
    update = tokens * (stay + come) + held + late + profile.largest_gradient
    return int(profile.weights + profile.device.optimizer + profile.device.gathered + max(loss, update))


def _inner(config: Any) -> int:
    """The width of the MLP, by the names that it has."""
    fields = config.to_dict()
    return fields.get("intermediate_size") or fields.get("ffn_dim") or fields.get("n_inner") or 4 * config.hidden_size


def _cost(sizes: Sizes, job: Job, rank: int, profile: Profile, devices: Devices, *, own: bool) -> float:
    tokens = job.batch_size * job.accumulate * job.seq_len
    hidden, inner, layers, vocabulary = sizes
    head = vocabulary * hidden
    matrices = layers * (4 * hidden**2 + 3 * hidden * inner)
    attention = 6.0 * layers * hidden * job.seq_len
    flops = tokens * (flops_per_token(sizes, matrices + 2 * head, job.seq_len) + 2.0 * head)
    if job.checkpointing:
        flops += tokens * (2.0 * matrices + attention / 3)
    if own:
        downs = job.accumulate if job.per_layer and profile.sums else 1
        refresh = 5 * math.log2(hidden) if job.optimizer in ("DCTAdamW", "Trion") else 6.0 * rank
        low_rank = 2.0 * rank * (downs + 1) + refresh / (1 if job.optimizer in EVERY_UPDATE else GAP)
        whole = {"Muon": 30.0 * hidden, "LoRAPre": 16.0 * rank}
        # What takes a whole matrix is made on every device.
        split = devices.number if devices.splits and job.optimizer not in whole else 1
        flops += matrices * whole.get(job.optimizer, low_rank) / split
    passes = 3 if job.checkpointing else 2
    traffic = job.accumulate * passes * (matrices * (5 if job.weights == "int8" else 2) + 2 * head)
    traffic += job.accumulate * 2 * profile.device.gradients + 2 * (profile.weights + profile.device.optimizer)
    return flops + BALANCE * traffic + LINK * profile.device.sent(devices, job.accumulate)
