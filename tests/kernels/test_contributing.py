"""The worked example of CONTRIBUTING.md does what its docstring says, under accumulation and with kernels too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import step_in_backward

ROOT = Path(__file__).parents[2]
U, V = (torch.linalg.qr(torch.randn(d, 4, generator=torch.Generator().manual_seed(d))).Q for d in (64, 32))
GRAD = U @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ V.mT


@pytest.fixture(scope="module")
def example() -> Any:
    source = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(source.group(1), namespace)
    return namespace["RandomGaLoreAdamW"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_random_basis_stays_random(example: Any, accumulate: int) -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    optimizer = example([p], rank=4, update_proj_gap=1)
    handle = step_in_backward(optimizer, accumulate=accumulate)
    shares = []
    for _ in range(12):
        for _ in range(accumulate):
            with handle.micro_batch():
                (p * GRAD).sum().div(accumulate).backward()
        shares.append(float((V.mT @ optimizer.state[p]["basis"]).square().sum() / 4))
    # Of a random subspace of 4 among 32 dimensions an eighth lies within a given one.
    assert sum(shares) / 12 == pytest.approx(1 / 8, abs=0.06)
    assert optimizer.state[p]["refreshes"] == 12


def test_kernels_make_the_same_steps(example: Any, device: torch.device) -> None:
    weights = []
    for backend in ("eager", "triton"):
        p = nn.Parameter(torch.zeros(64, 32, device=device))
        optimizer = example([p], rank=4, update_proj_gap=2, backend=backend)
        for _ in range(4):
            p.grad = GRAD.to(device)
            optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_options_that_nobody_reads_or_that_are_missing_are_errors(example: Any) -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(
        TypeError, match="RandomGaLoreAdamW has no option 'update_proj_gpa'; did you mean update_proj_gap"
    ):
        example([p], update_proj_gpa=5)
    with pytest.raises(ValueError, match=r"Invalid option 'update_proj_gpa' in a parameter group.*update_proj_gap\?"):
        example([{"params": [p], "rank": 4, "update_proj_gpa": 5}])

    class Forgetful(example):
        def __init__(self, params: Any) -> None:
            super(example, self).__init__(params, {"betas": (0.9, 0.999), "eps": 1e-6, "rank": 4})

    with pytest.raises(TypeError, match="Forgetful misses the option 'lr'"):
        Forgetful([p])
