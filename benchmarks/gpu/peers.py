"""The published packages beside ours on one layer of LLaMA-7B, as far as they are installed or carried along."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.contestants import Contestant, contestants
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import timed
from benchmarks.kernel_steps import ADAMW, layer_shapes, parameters

RANK = 256
OURS = ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "APOLLOMini", "GaLoreAdafactor")
PEERS = ("galore-torch", "apollo-torch", "fira", "torch")
EIGHT_BIT = "bitsandbytes AdamW8bit, bf16"


def tasks(setting: Setting) -> list[Task]:
    chosen = [one for one in contestants() if one.name in OURS or one.name.split()[0] in PEERS]
    found = [Task(one.name, partial(measured, setting, one)) for one in chosen]
    return [*found, Task(EIGHT_BIT, partial(bitsandbytes, setting))]


def _shapes(setting: Setting) -> list[tuple[int, int]]:
    return layer_shapes("llama_7b") if setting.cuda else [(24, 40)] * 2


def measured(setting: Setting, one: Contestant) -> dict[str, Any]:
    """Milliseconds of a step between refreshes, weights in bf16, and the bytes of the state."""
    params = parameters(_shapes(setting), setting.device, torch.bfloat16)
    grads = [p.grad for p in params]
    before = torch.cuda.memory_allocated() if setting.cuda else 0
    optimizer = one.build(params, RANK if setting.cuda else 8)

    def step() -> None:
        # Published code drops or replaces gradients.
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    step()
    figures: dict[str, Any] = timed(setting, step)
    if setting.cuda:
        figures["state_bytes"] = torch.cuda.memory_allocated() - before
    return {"arguments": dict(one.arguments), "rank": RANK, **figures}


def bitsandbytes(setting: Setting) -> dict[str, Any]:
    dtype, _, make = ADAMW[EIGHT_BIT]
    optimizer = make(parameters(_shapes(setting), setting.device, dtype))
    optimizer.step()
    return timed(setting, optimizer.step)
