"""The kernel for scales of rows against the eager function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.limited_scale import limited_scale as eager

# Options beside a limit, and whether there is something to project back.
FIRA: dict[str, Any] = {"gamma": 1.01, "inner": 0.25, "back": 1.0}
CASES: list[tuple[dict[str, Any], bool]] = [
    (FIRA, True),
    ({**FIRA, "dtype": torch.bfloat16}, True),
    ({"gamma": None}, False),
    ({"gamma": 1.01, "whole": True, "strength": 3.0, "seen": 0.3}, False),
    ({"gamma": 1.2, "inner": 1.0, "strength": 0.25, "image": True, "seen": True}, False),
]


def random(shape: tuple[int, ...], device: torch.device, *, normal: bool = False) -> Tensor:
    return torch.randn(shape).to(device) if normal else torch.rand(shape).to(device)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("shape", [(37, 5), (3, 40, 4), (1100, 3), (9, 300)], ids=str)
@pytest.mark.parametrize("bad", [False, True])
def test_as_the_eager_function(
    options: tuple[dict[str, Any], bool], shape: tuple[int, ...], bad: bool, device: torch.device
) -> None:
    given, projects = options
    *batch, rows, _ = shape
    norms, grad_norms = random((2, *batch, rows), device), 3 * random((*batch, rows, 1), device)
    low, direction = (random(shape, device, normal=True) for _ in range(2))
    if bad:
        # One row of one matrix, and what such a gradient makes of its projection.
        grad_norms.view(-1)[1], low.view(-1)[0] = torch.nan, torch.inf
    options = dict(given)
    if "image" in options:
        options |= {"image": random((*batch, rows, 1), device), "seen": torch.tensor(0.5, device=device)}
    results = []
    for operation in (eager, pick(eager, "triton", device)):
        update_norm = torch.full(tuple(batch), 0.7, device=device)
        # The second step meets the norm that the first one left.
        for _ in range(2):
            sides = {"low": low.clone(), "direction": direction.clone()} if projects else {}
            scale, update_norm, left = operation(norms, grad_norms, update_norm, **options, **sides)
        results.append((scale, update_norm, left))
    (scale, update_norm, left), (our_scale, our_norm, our_left) = results
    torch.testing.assert_close(our_scale, scale, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(our_norm, update_norm, rtol=1e-5, atol=0)
    assert (left is None) == (our_left is None) == (not projects)
    if left is not None and our_left is not None:
        rtol = 2.0**-7 if left.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(our_left, left, rtol=rtol, atol=1e-6)
        assert bool(our_left.isfinite().all())
    assert bool((our_scale == 0).all()) == bad
    assert bool((our_norm == 0.7).all()) == (bad or given["gamma"] is None)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    norms, grad_norms, update_norm = (torch.ones(s, device=device) for s in ((2, 4), (4, 1), ()))
    with pytest.raises(ValueError, match="Invalid grad_norms: "):
        kernel(norms, grad_norms[:3], update_norm, gamma=1.01)
    with pytest.raises(ValueError, match="Invalid update_norm: "):
        kernel(norms, grad_norms, update_norm.double(), gamma=1.01)
    with pytest.raises(ValueError, match="Invalid direction: "):
        kernel(norms, grad_norms, update_norm, gamma=1.01, low=torch.ones(4, 2, device=device), direction=norms)
