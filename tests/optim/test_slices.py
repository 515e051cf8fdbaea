"""Large tensors are computed on in slices: the same bits, in memory for one slice."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optimizers import build

CASES: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {"state_dtype": "int8"}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "weight_decay": 0.1}),
    ("GaLoreAdamW8bit", {"weight_rounding": "stochastic", "backend": "eager"}),
    ("GaLoreAdamW", {"weight_rounding": "compensated", "capturable": True}),
    ("DCTAdamW", {"state_dtype": "int8", "weight_rounding": "compensated", "weight_decay": 0.1}),
    ("FRUGALAdamW", {"state_dtype": "bfloat16", "weight_rounding": "stochastic", "capturable": True}),
    ("APOLLOAdamW", {"state_dtype": "int8"}),
    ("GaLoreAdafactor", {"state_dtype": "int8", "beta1": 0.9}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in CASES]


def run(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[dict[str, Any]]]:
    torch.manual_seed(1)
    # A full-rank matrix, a compressed one whose low-rank moments are in 8 bits, and one against the layout.
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 1250), (1250, 9))]
    params.append(nn.Parameter(torch.randn(1250, 4).to(dtype).T))
    optimizer = build(name, params, **kwargs)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return [p.detach() for p in params], list(optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=IDS)
def test_slices_are_the_same_bits(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(name, kwargs, dtype)
    for module in ("state_storage", "rules.adam"):
        monkeypatch.setattr(f"lowrank_optim.optim.{module}.SLICE", 768)
    sliced = run(name, kwargs, dtype)
    for a, b in zip(whole[0], sliced[0]):
        assert torch.equal(a, b)
    for state, other in zip(whole[1], sliced[1]):
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


PEAK = """
import resource, sys, torch
from torch import nn
from lowrank_optim import GaLoreAdamW
torch.set_num_threads(1)
torch.manual_seed(0)
p = nn.Parameter(torch.ones(4000, 5000, dtype=torch.bfloat16))
p.grad = torch.ones_like(p)
small = nn.Parameter(torch.ones(1000, 1000, dtype=torch.bfloat16))
small.grad = torch.ones_like(small)
kwargs = {"rank": None, "state_dtype": sys.argv[1], "weight_rounding": sys.argv[2]}
optimizers = [GaLoreAdamW([w], **kwargs) for w in (small, p)]
optimizers[0].step()
state = optimizers[1].init_state(p, optimizers[1].param_groups[0])
for value in state.values():
    # Pages that nothing was written to do not count.
    if isinstance(value, torch.Tensor):
        value.fill_(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimizers[1].step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(
    ("state_dtype", "rounding"),
    [("int8", "stochastic"), ("bfloat16", "compensated")],
)
def test_a_step_takes_little_memory_whatever_the_size(state_dtype: str, rounding: str) -> None:
    """20 million weights; it was 553 MB with all of them at once."""
    command = [sys.executable, "-c", PEAK, state_dtype, rounding]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 160
