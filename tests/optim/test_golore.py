"""What is particular to GoLore."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, GoLoreAdamW, step_in_backward
from tests.reference.golore import golore

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "rank": 3}


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[Tensor]) -> list[Tensor]:
    """The bases that were used."""
    bases = []
    for grad in grads:
        p.grad = grad
        optimizer.step()
        bases.append(optimizer.state[p]["basis"].clone())
    return bases


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)], ids=str)
@pytest.mark.parametrize("random_from", [0, 4, 100])
def test_the_formulas_of_the_paper(shape: tuple[int, int], random_from: int) -> None:
    weight, *grads = torch.randn(13, *shape, dtype=torch.float64)
    p = nn.Parameter(weight.clone())
    options = {"update_proj_gap": 3, "random_from": random_from, "scale": 0.3}
    bases = run(GoLoreAdamW([p], refresh="svd", **options, **SETTINGS), p, grads)
    drawn = [basis for t, basis in enumerate(bases) if t % 3 == 0 and t >= random_from]
    expected = golore(weight, grads, drawn, gap=3, random_from=random_from, scale=0.3, **SETTINGS)
    torch.testing.assert_close(p.detach(), expected[-1], rtol=0, atol=1e-12)
    assert not any(torch.equal(a, b) for a, b in zip(bases, bases[3:]))


def test_until_it_draws_it_is_galore_with_a_moment_that_moves() -> None:
    grads = list(torch.randn(9, 14, 9))
    params = [nn.Parameter(torch.ones(14, 9)) for _ in range(2)]
    options = {"update_proj_gap": 100, **SETTINGS}
    for p, cls in zip(params, (GaLoreAdamW, GoLoreAdamW)):
        run(cls([p], **options), p, grads)
    assert torch.equal(*params)


def test_bases_are_orthonormal_and_uniform() -> None:
    """The mean of P Pᵀ over many draws is (rank / n) I."""
    total = torch.zeros(9, 9, dtype=torch.float64)
    for number in range(200):
        p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
        optimizer = GoLoreAdamW([(f"layers.{number}.weight", p)], random_from=0, **SETTINGS)
        (basis,) = run(optimizer, p, [torch.ones(14, 9, dtype=torch.float64)])
        torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))
        total += basis @ basis.mT / 200
    # An entry has a standard deviation of at most 0.3 / sqrt(200).
    torch.testing.assert_close(total, torch.eye(9, dtype=torch.float64) / 3, rtol=0, atol=0.1)


def test_a_basis_is_a_function_of_name_and_update() -> None:
    params = [nn.Parameter(torch.zeros(14, 9)) for _ in range(2)]
    one, other = (GoLoreAdamW([("layers.0.weight", p)], random_from=0, update_proj_gap=2, **SETTINGS) for p in params)
    run(one, params[0], list(torch.randn(2, 14, 9)))
    other.load_state_dict(one.state_dict())
    # Of gradients that differ.
    bases = [run(optimizer, p, list(torch.randn(3, 14, 9)))[-1] for optimizer, p in zip((one, other), params)]
    assert torch.equal(*bases)


@pytest.mark.parametrize("refresh", ["power", "randomized"])
def test_micro_batches_draw_too_and_keep_no_second_phase(refresh: str) -> None:
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = GoLoreAdamW([p], random_from=3, update_proj_gap=2, refresh=refresh, **SETTINGS)
    handle = step_in_backward(optimizer, accumulate=2)
    bases, pending = [], []
    for _ in range(9):
        for _ in range(2):
            with handle.micro_batch():
                (p * torch.randn(14, 9)).sum().backward()
        bases.append(optimizer.state[p]["basis"].clone())
        pending.append("pending" in optimizer.state[p])
    assert all(torch.isfinite(basis).all() for basis in bases)
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed[4:] == [False, True, False, True] or changed[4:] == [True, False, True, False]
    assert not any(pending[4:])


def test_until_it_draws_micro_batches_make_galores_basis() -> None:
    grads, bases = torch.randn(5, 14, 9), []
    for cls in (GaLoreAdamW, GoLoreAdamW):
        p = nn.Parameter(torch.zeros(14, 9))
        optimizer = cls([p], update_proj_gap=2, **SETTINGS)
        handle = step_in_backward(optimizer, accumulate=2)
        for grad in grads:
            for part in (0.25, 0.75):
                with handle.micro_batch():
                    (p * grad * part).sum().backward()
        bases.append(optimizer.state[p]["basis"])
    assert torch.equal(*bases)


def test_values_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="Invalid random_from: -1, expected a non-negative int"):
        GoLoreAdamW([nn.Parameter(torch.ones(8, 8))], rank=2, random_from=-1)
