"""The published packages beside ours on one layer of LLaMA-7B, as far as they are installed or carried along."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Candidate, candidates, every_svd_once
from benchmarks.common import held_bytes
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import timed
from benchmarks.kernel_steps import ADAMW, layer_shapes, parameters

RANK = 256
OURS = ("GaLoreAdamW", "FiraAdamW", "APOLLOAdamW", "APOLLOMini", "GaLoreAdafactor")
# Those with SVDs last.
PEERS = ("torch", "apollo-torch", "galore-torch", "fira")
DECOMPOSED: dict[Any, tuple[Tensor, ...]] = {}
EIGHT_BIT = "bitsandbytes AdamW8bit, bf16"


def tasks(setting: Setting) -> list[Task]:
    everyone = list(candidates())
    chosen = [one for one in everyone if one.name in OURS]
    chosen += [one for peer in PEERS for one in everyone if one.name.split()[0] == peer]
    found = [Task(one.name, partial(measured, setting, one)) for one in chosen]
    return [Task(EIGHT_BIT, partial(bitsandbytes, setting)), *found]


def _shapes(setting: Setting) -> list[tuple[int, int]]:
    return layer_shapes("llama_7b") if setting.cuda else [(24, 40)] * 2


def measured(setting: Setting, one: Candidate) -> dict[str, Any]:
    """Milliseconds of a step between refreshes, weights in bf16, and the bytes of the state."""
    params = parameters(_shapes(setting), setting.device, torch.bfloat16)
    grads = [p.grad for p in params]
    optimizer = one.build(params, RANK if setting.cuda else 8)

    def step() -> None:
        # Published code drops or replaces gradients.
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    # The first step's SVDs take seconds each, and all have the same gradients.
    with every_svd_once(DECOMPOSED):
        step()
    state = held_bytes(optimizer.state, exclude=[*params, *(grad for grad in grads if grad is not None)])
    return {"arguments": dict(one.arguments), "rank": RANK, **timed(setting, step), "state_bytes": state}


def bitsandbytes(setting: Setting) -> dict[str, Any]:
    dtype, _, make = ADAMW[EIGHT_BIT]
    optimizer = make(parameters(_shapes(setting), setting.device, dtype))
    optimizer.step()
    return timed(setting, optimizer.step)
