"""Who is measured: every public optimizer of this package, torch's AdamW and Muon, and the published packages."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lowrank_optim
from lowrank_optim.pretrain.optimizers import low_rank_names

# Between refreshes: none falls due within a benchmark after the first step.
NEVER = 10**9
LR = 1e-6

# Arguments beside lr, rank and update_proj_gap=NEVER; what a class does not take is left out of the latter two.
ARGUMENTS: dict[str, dict[str, Any]] = {
    # The published C4 runs turn it off.
    "GaLoreAdafactor": {"scale_parameter": False},
    # Published with a new subspace at every step.
    "DCTAdamW": {"update_proj_gap": 1},
    "LDAdamW": {"update_proj_gap": 1},
    "Trion": {"update_proj_gap": 1},
    "APOLLOMini": {"rank": 1},
}
# A second run of a class with other arguments.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("DCTAdamW", {"update_proj_gap": 1, "error_feedback": "full"}),
    ("FiraAdamW", {"residual": "paper"}),
]


class Candidate(NamedTuple):
    """``build`` takes parameters and a rank; ``arguments`` are what tells it from others of its class.

    once: its first step on the matrices of one layer stands for all: a step on all takes minutes.
    """

    name: str
    build: Callable[[Sequence[nn.Parameter], int], Optimizer]
    arguments: Mapping[str, Any]
    once: bool = False


def candidates() -> Iterator[Candidate]:
    """Everyone; building or stepping one may fail where a package is missing."""
    for optimizer in own_names():
        variants = [ARGUMENTS.get(optimizer, {}), *(args for name, args in VARIANTS if name == optimizer)]
        for i, arguments in enumerate(variants):
            label = optimizer if i == 0 else f"{optimizer}({', '.join(f'{k}={v}' for k, v in arguments.items())})"
            yield Candidate(label, built(optimizer, arguments), arguments)
    for way in ("foreach", "fused"):
        yield Candidate(f"torch AdamW {way}", _torch_adamw(way), {way: True})
    # It multiplies in bf16, which most CPUs do not.
    yield Candidate("torch Muon", _torch_muon, {}, once=True)
    for label, (module, cls, group, arguments) in PEERS.items():
        yield Candidate(label, _peer(module, cls, group, arguments), {**group, **arguments})


def own_names() -> list[str]:
    """The public optimizers of this package that work on ordinary weights."""
    return low_rank_names()


def built(name: str, arguments: Mapping[str, Any]) -> Callable[[Sequence[nn.Parameter], int], Optimizer]:
    """How an optimizer of this package is built."""

    def build(params: Sequence[nn.Parameter], rank: int) -> Optimizer:
        cls = getattr(lowrank_optim, name)
        common = {"rank": rank, "update_proj_gap": NEVER}
        accepted = inspect.signature(cls).parameters
        taken = {key: value for key, value in common.items() if key in accepted}
        optimizer: Optimizer = cls(params, lr=LR, **{**taken, **arguments})
        return optimizer

    return build


def _torch_adamw(way: str) -> Callable[[Sequence[nn.Parameter], int], Optimizer]:
    return lambda params, rank: torch.optim.AdamW(params, lr=LR, **{way: True})  # type: ignore[arg-type]


def _torch_muon(params: Sequence[nn.Parameter], rank: int) -> Optimizer:
    # New in torch 2.9.
    from torch.optim import Muon

    return Muon(params, lr=LR)


# label: module, class, the keys of its low-rank group beside the gap, arguments of its constructor.
# A rank of None is that of the comparison.
PEERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "galore-torch GaLoreAdamW": (
        "galore_torch", "GaLoreAdamW",
        {"rank": None, "scale": 0.25, "proj_type": "std"}, {"no_deprecation_warning": True},
    ),
    "galore-torch GaLoreAdafactor": (
        "galore_torch", "GaLoreAdafactor",
        {"rank": None, "scale": 0.25, "proj_type": "std"}, {"relative_step": False, "scale_parameter": False},
    ),
    "apollo-torch APOLLO": (
        "apollo_torch", "APOLLOAdamW",
        {"rank": None, "scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}, {},
    ),
    "apollo-torch APOLLO-Mini": (
        "apollo_torch", "APOLLOAdamW",
        {"rank": 1, "scale": 128.0, "proj_type": "std", "proj": "random", "scale_type": "tensor"}, {},
    ),
    "fira FiraAdamW": (
        "fira", "FiraAdamW", {"rank": None, "alpha": 0.25, "proj_type": "std"}, {"no_deprecation_warning": True},
    ),
}  # fmt: skip


def _peer(
    module: str, cls: str, group: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Callable[[Sequence[nn.Parameter], int], Optimizer]:
    def build(params: Sequence[nn.Parameter], rank: int) -> Optimizer:
        keys = {**group, "rank": group["rank"] or rank, "update_proj_gap": NEVER, "params": list(params)}
        optimizer: Optimizer = getattr(importlib.import_module(module), cls)([keys], lr=LR, **arguments)
        return optimizer

    return build


@contextmanager
def every_svd_once(memo: dict[Any, tuple[Tensor, ...]]) -> Iterator[None]:
    """Within it, ``torch.linalg.svd`` of the same matrix is computed once and copied from then on.

    For first steps, which are not timed: minutes of the same decompositions for each of the published packages.
    """
    decompose = torch.linalg.svd

    def svd(matrix: Tensor, full_matrices: bool = True, **options: Any) -> tuple[Tensor, ...]:
        key = (matrix.shape, matrix.stride(), matrix.dtype, full_matrices, matrix.sum().item(), matrix[0, 0].item())
        if key not in memo:
            memo[key] = tuple(decompose(matrix, full_matrices=full_matrices, **options))
        # clone() keeps the strides, on which the speed of the products depends.
        return tuple(part.clone() for part in memo[key])

    with mock.patch.object(torch.linalg, "svd", svd), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
