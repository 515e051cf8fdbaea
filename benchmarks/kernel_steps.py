"""Whole optimizer steps on one decoder layer of LLaMA: against eager, against AdamW, against what the device allows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

import lowrank_optim
from benchmarks.baselines import LR, NEVER
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.pretrain.llama import PRESETS

# Milliseconds of a call.
Clock: TypeAlias = Callable[[Callable[[], Any]], float]

# Those whose whole step is held against eager, and timed.
METHODS = ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "DCTAdamW", "Trion")
RANKS = (256, 1024)
# Updates between two refreshes over which a refresh is spread.
GAP = 200
# Steps that are compared.
STEPS = 4


class Limit(NamedTuple):
    """What the device reaches: bytes a second of a copy, FLOPs a second of a bf16 product."""

    bandwidth: float
    flops: float

    def milliseconds(self, moved: float, flops: float) -> float:
        return 1e3 * max(moved / self.bandwidth, flops / self.flops)


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """The seven matrices of a decoder layer, (out, in)."""
    hidden, ffn = PRESETS[model].hidden, PRESETS[model].intermediate
    return [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]


def parameters(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Random weights with gradients."""
    found = [nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype)) for shape in shapes]
    for p in found:
        p.grad = (1e-3 * torch.randn(p.shape, device=device)).to(dtype)
    return found


def build(method: str, params: list[nn.Parameter], rank: int, **options: Any) -> LowRankOptimizer:
    """An optimizer that refreshes once, at its first step; a method that has no rank chooses for itself."""
    cls = getattr(lowrank_optim, method)
    accepted = inspect.signature(cls).parameters
    usual = {"rank": rank, "update_proj_gap": NEVER, "lr": LR, **options}
    optimizer: LowRankOptimizer = cls(params, **{name: value for name, value in usual.items() if name in accepted})
    return optimizer


def must_move_and_do(method: str, shapes: list[tuple[int, int]], rank: int) -> tuple[float, float] | None:
    """Bytes and FLOPs of a step between refreshes with bf16 weights and fp32 moments; None where nobody has counted.

    Weight in and out, gradient once (twice where it also enters the update), two moments in and out, the basis once.
    """
    if method not in ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW"):
        return None
    moved = flops = 0.0
    for rows, columns in shapes:
        size, tall, small = rows * columns, max(rows, columns), min(rows, columns)
        reads = 1 if method == "GaLoreAdamW" else 2
        # APOLLO draws its basis again instead of storing it, and has no product back.
        basis = 0 if method == "APOLLOAdamW" else 2 * small * rank
        moved += 2 * (2 + reads) * size + 16 * tall * rank + basis
        flops += (2 if method == "APOLLOAdamW" else 4) * size * rank
    return moved, flops


def distance(
    method: str, device: torch.device, *, dtype: torch.dtype = torch.float32, backend: str | None = "triton",
    **options: Any,
) -> float:  # fmt: skip
    """How far a run with this backend ends from one with "eager", relative to how far that went."""
    torch.manual_seed(0)
    # A tall matrix, whose moments are enough for 8 bits, a wide one, a square one, a stack, and what is not compressed.
    shapes = [(530, 20), (20, 33), (24, 24), (3, 17, 30), (40,)]
    start = parameters(shapes, device, dtype)
    ends = []
    for chosen in ("eager", backend):
        params = copy.deepcopy(start)
        optimizer = build(method, params, 8, lr=1e-2, backend=chosen, update_proj_gap=2, **options)
        for step in range(STEPS):
            for p, first in zip(params, start, strict=True):
                assert first.grad is not None
                p.grad = first.grad.roll(step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten().double() for p in params]))
    went = ends[0] - torch.cat([p.detach().flatten().double() for p in start])
    return float((ends[1] - ends[0]).norm() / went.norm())


def replay_distance(method: str, device: torch.device) -> float:
    """The greatest difference between weights after replays of a CUDA graph and after as many ordinary steps."""
    torch.manual_seed(0)
    start = parameters([(256, 192), (192, 256)], device, torch.bfloat16)
    ends = []
    for captured in (False, True):
        params = copy.deepcopy(start)
        for p, first in zip(params, start, strict=True):
            p.grad = first.grad
        optimizer = build(method, params, 64, lr=1e-2, capturable=True)
        # The first refreshes, the second is what a graph holds; both compile and warm up.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        step: Callable[[], Any] = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for _ in range(STEPS):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    return float((ends[1] - ends[0]).abs().max())


def _fused(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def _bitsandbytes(params: list[nn.Parameter]) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=LR)
    return optimizer


# What full-rank training steps with. Bytes a weight: itself in and out, its gradient, two moments in and out.
ADAMW: dict[str, tuple[torch.dtype, int, Callable[[list[nn.Parameter]], Optimizer]]] = {
    "torch AdamW fused, fp32": (torch.float32, 28, _fused),
    "torch AdamW fused, bf16": (torch.bfloat16, 14, _fused),
    "bitsandbytes AdamW8bit, bf16": (torch.bfloat16, 10, _bitsandbytes),
}
FULL_RANK = "torch AdamW fused, fp32"
# bf16 weights with fp32 moments, which torch's kernel does not take together: the fp32 time by bytes.
MIXED_BYTES = 22


def adamw_row(
    name: str, model: str, device: torch.device, time: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    """Milliseconds of a step on one decoder layer.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    dtype, moved, make = ADAMW[name]
    optimizer = make(parameters(layer_shapes(model), device, dtype))
    optimizer.step()
    return {"optimizer": name, "bytes a weight": moved, "ms": time(optimizer.step)}


def step_row(
    model: str, method: str, rank: int, backend: str, device: torch.device, limit: Limit, time: Clock
) -> dict[str, Any]:
    """Milliseconds of a step on one decoder layer, its limit, and what a refresh every 200 steps adds to a step."""
    shapes = layer_shapes(model)
    optimizer = build(method, parameters(shapes, device, torch.bfloat16), rank, backend=backend)
    optimizer.step()
    ms = time(optimizer.step)
    for group in optimizer.param_groups:
        group["update_proj_gap"] = 1
    refresh = time(optimizer.step) - ms
    counted = must_move_and_do(method, shapes, rank)
    least = limit.milliseconds(*counted) if counted else None
    return {
        "method": method, "rank": rank, "backend": backend, "ms": ms, "limit_ms": least,
        "ms / limit": None if least is None else ms / least, "refresh share": refresh / GAP / ms,
    }  # fmt: skip


def targets(adamw: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the Triton steps are held to, as far as it was measured."""
    at = {(row["method"], row["rank"]): row for row in steps if row["backend"] == "triton"}
    full = [row["ms"] * MIXED_BYTES / row["bytes a weight"] for row in adamw if row["optimizer"] == FULL_RANK]
    found = []

    def add(what: str, value: float, at_most: float) -> None:
        found.append({"target": what, "value": value, "at most": at_most, "met": value <= at_most})

    for (method, rank), row in at.items():
        if row["ms / limit"] is not None:
            add(f"{method}, rank {rank}: step / limit", row["ms / limit"], 1.3)
            add(f"{method}, rank {rank}: refresh over {GAP} steps", row["refresh share"], 0.03)
        if full and rank == RANKS[0]:
            add(f"{method}, rank {rank}: step / fused AdamW with fp32 moments", row["ms"] / full[0], 0.6)
        if method == "FiraAdamW" and ("GaLoreAdamW", rank) in at:
            add(f"Fira / GaLore, rank {rank}", row["ms"] / at["GaLoreAdamW", rank]["ms"], 1.1)
    return found
