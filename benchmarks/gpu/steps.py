"""Whole optimizer steps on a layer of LLaMA-7B, all of 60M and 1B: launched, replayed, on the host, with a refresh."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import lowrank_optim
from benchmarks.baselines import LR, NEVER
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.kernel_steps import GAP, layer_shapes, parameters
from lowrank_optim.pretrain.llama import PRESETS

METHODS = ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "GaLoreAdamW8bit", "DCTAdamW", "Trion")
ADAMW = "torch AdamW fused"
STEPS = 5


class Row(NamedTuple):
    """One step to be measured. ``whole``: with embedding, head and norms, which are not compressed."""

    model: str
    whole: bool
    method: str
    rank: int
    backend: str | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        what = f"all of {self.model}" if self.whole else f"a layer of {self.model}"
        if self.method == ADAMW:
            return f"{what}, {ADAMW}, {str(self.dtype).removeprefix('torch.')}"
        return f"{what}, {self.method}, rank {self.rank}, {self.backend or 'default'}"


def rows(setting: Setting) -> dict[str, Row]:
    """All by name, those first from which most can be said."""
    seven, small, large = ("llama_7b", "llama_60m", "llama_1b") if setting.cuda else (None, "llama_9m", None)
    found: list[Row] = []
    if seven and large:
        found += [Row(seven, False, ADAMW, 0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        found += [Row(seven, False, method, 256) for method in METHODS]
        found += [Row(seven, False, method, 1024) for method in METHODS[:4]]
        for model, rank in ((small, 128), (large, 512)):
            found += [Row(model, True, ADAMW, 0), *(Row(model, True, method, rank) for method in METHODS[:4])]
        found += [Row(seven, False, m, rank, way) for rank in (256, 1024) for m in METHODS[:3] for way in WAYS]
    else:
        found += [Row(small, False, ADAMW, 0), Row(small, False, METHODS[0], 16), Row(small, True, METHODS[1], 16)]
    return {row.name: row for row in found}


WAYS = ("triton", "eager")


def tasks(setting: Setting) -> list[Task]:
    return [Task(name, partial(measured, setting, row)) for name, row in rows(setting).items()]


def groups(row: Row, device: torch.device) -> list[dict[str, Any]]:
    """Random parameters with gradients: the matrices of the layers, then what is not compressed."""
    shape = PRESETS[row.model]
    layers = shape.layers if row.whole else 1
    matrices = parameters(layer_shapes(row.model) * layers, device, row.dtype)
    found: list[dict[str, Any]] = [{"params": matrices}]
    if row.whole:
        others = parameters([(shape.vocab, shape.hidden)] * 2, device, row.dtype)
        for _ in range(2 * layers + 1):
            norm = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=row.dtype))
            norm.grad = torch.full_like(norm, 1e-3)
            others.append(norm)
        found.append({"params": others})
    return found


def optimizer_of(row: Row, device: torch.device, **options: Any) -> Optimizer:
    """Refreshes at its first step only."""
    parts = groups(row, device)
    if row.method == ADAMW:
        return torch.optim.AdamW(parts, lr=LR, fused=True, **options)
    for group, rank in zip(parts, (row.rank, None)):
        group["rank"] = rank
    cls = getattr(lowrank_optim, row.method)
    optimizer: Optimizer = cls(parts, lr=LR, update_proj_gap=NEVER, backend=row.backend, **options)
    return optimizer


def twice(setting: Setting, row: Row) -> dict[str, Any]:
    """The first step refreshes, the second does not: then all kernels have been compiled."""
    optimizer = optimizer_of(row, setting.device)
    for _ in range(2):
        optimizer.step()
    return {"launched": True}


def measured(setting: Setting, row: Row) -> dict[str, Any]:
    optimizer = optimizer_of(row, setting.device)
    for _ in range(2):
        optimizer.step()
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    figures: dict[str, Any] = {**row._asdict(), "dtype": str(row.dtype), "weights": weights}
    figures |= timed(setting, optimizer.step)
    if row.method != ADAMW:
        for group in optimizer.param_groups:
            group["update_proj_gap"] = 1
        refreshed = timed(setting, optimizer.step)["ms"]
        figures["refresh_ms"] = refreshed - figures["ms"]
        figures["refresh_share"] = figures["refresh_ms"] / GAP / figures["ms"]
    del optimizer
    if setting.cuda and row.backend is None:
        try:
            figures["replayed_ms"] = replayed(setting, row)
        except Exception as error:
            # The launched step has been measured all the same.
            figures["not_replayed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return figures


def timed(setting: Setting, step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a step among others, and of the host for one that nothing waits for."""
    step()
    steps, rounds = (STEPS, 3) if setting.cuda else (1, 1)
    host = []
    for _ in range(steps):
        setting.synchronize()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    walls = []
    for _ in range(rounds):
        setting.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        setting.synchronize()
        walls.append((time.perf_counter() - start) / steps)
    return {"ms": 1e3 * statistics.median(walls), "host_ms": 1e3 * statistics.median(host)}


def replayed(setting: Setting, row: Row) -> float:
    """Milliseconds of a step that a CUDA graph replays."""
    optimizer = optimizer_of(row, setting.device, capturable=True)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return timed(setting, graph.replay)["ms"]
