"""A stack of E matrices trains as E matrices, in every row of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.parts import Slot
from tests.conformance import every_variant, quiet, values, without_draws

pytestmark = pytest.mark.filterwarnings("ignore:.*non-finite gradient", "ignore:.*all get the full-rank rule")

EXPERTS, STEPS = 4, 8
# Moments and errors of one matrix are whole blocks of the 8-bit formats, so that blocks end where matrices do.
SHAPES = [(64, 8), (8, 64)]


@pytest.fixture(autouse=True)
def _small_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)


def kwargs_of(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    # The refreshes of six parameters are spread differently from those of two.
    fixed = without_draws(name, kwargs) | {"weight_decay": 0.1, "stagger": False}
    if name == "QGaLoreAdamW8bit":
        # A stack has one gap for all of its matrices.
        fixed["gamma_proj"] = 1
    return fixed


def start_alike(together: LowRankOptimizer, alone: LowRankOptimizer) -> None:
    """What is drawn for a stack at the start is for its matrices, too."""
    group, single = together.param_groups[0], iter(alone.param_groups[0]["params"])
    for stack in group["params"]:
        drawn = [
            key for key, slot in together.slots_of(stack, group).items() if isinstance(slot, Slot) and slot.std > 0
        ]
        for expert in range(EXPERTS):
            matrix = next(single)
            if drawn:
                state = together.state[stack] or together.init_state(stack, group)
                own = alone.init_state(matrix, alone.param_groups[0])
                own.update({key: state[key][expert].clone() for key in drawn})


def is_absent(expert: int, step: int) -> bool:
    """The first matrix always has a gradient, the second none at first, the third none at a refresh, the last never."""
    return (expert == 1 and step < 2) or (expert == 2 and step in (3, 4)) or expert == 3


def stack_and_singles(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype = torch.float32, *, absent: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (EXPERTS, m, n) of both ways to train; with ``absent`` gradients of some matrices are zero."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(EXPERTS, *shape, generator=generator).to(dtype) for shape in SHAPES]
    stacks = [nn.Parameter(start.clone()) for start in starts]
    singles = [nn.Parameter(matrix.clone()) for start in starts for matrix in start]
    together, alone = (quiet(name, params, **kwargs) for params in (stacks, singles))
    start_alike(together, alone)
    for step in range(STEPS):
        grads = [torch.randn(EXPERTS, *shape, generator=generator).to(dtype) for shape in SHAPES]
        for grad in grads:
            for expert in range(EXPERTS):
                if absent and is_absent(expert, step):
                    grad[expert] = 0
        for p, grad in zip(stacks, grads):
            p.grad = grad
        for p, matrix in zip(singles, [matrix for grad in grads for matrix in grad]):
            p.grad = matrix.clone()
        together.step()
        alone.step()
    lone = values(alone, singles)
    return values(together, stacks), [torch.stack(lone[:EXPERTS]), torch.stack(lone[EXPERTS:])]


@every_variant
@pytest.mark.parametrize("absent", [False, True], ids=["", "absent"])
def test_a_stack_trains_as_its_matrices(name: str, kwargs: dict[str, Any], absent: bool) -> None:
    fixed = kwargs_of(name, kwargs)
    if absent:
        # A refresh of some matrices rounds the moments of all once more, and a selection may follow the rounding.
        fixed |= {"state_dtype": "float32"}
    together, alone = stack_and_singles(name, fixed, absent=absent)
    # Rounded stochastically a moment is off by 2^-8 of itself, in 4 bits by a seventh of the largest of its block.
    tolerance = {"bfloat16": 1e-3, "int4": 3e-2}.get(fixed.get("state_dtype", "float32"), 1e-6)
    # FRUGAL counts one age of the moments for all matrices of a stack.
    compared = slice(1) if absent and name == "FRUGALAdamW" and kwargs.get("reset_moments", True) else slice(None)
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[compared], b[compared], rtol=tolerance, atol=tolerance)


@every_variant
def test_a_stack_in_bfloat16(name: str, kwargs: dict[str, Any]) -> None:
    together, alone = stack_and_singles(name, kwargs_of(name, kwargs), torch.bfloat16)
    for a, b in zip(together, alone):
        off = float((a - b).float().norm() / b.float().norm())
        assert off < 2.0**-6


@every_variant
def test_matrices_without_a_gradient_stand_still(name: str, kwargs: dict[str, Any]) -> None:
    """The rows as they are: what is drawn at random, or rounded, for one matrix does not reach another."""
    stack = nn.Parameter(torch.ones(3, 64, 8))
    optimizer = quiet(name, [stack], **{"weight_decay": 0.0, **kwargs})
    for step in range(STEPS):
        stack.grad = torch.zeros_like(stack)
        stack.grad[1] = torch.randn(64, 8)
        if step > 4:
            stack.grad[2] = torch.randn(64, 8)
        optimizer.step()
        assert torch.equal(stack[0], torch.ones(64, 8))
        assert torch.equal(stack[2], torch.ones(64, 8)) == (step <= 4)
    assert bool(stack.isfinite().all())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("APOLLOAdamW", {}),
        ("APOLLOMini", {}),
        ("FRUGALAdamW", {}),
        ("FRUGALAdamW", {"projection": "random"}),
        ("GaLoreAdamW", {"refresh": "svd", "selection": "spectral"}),
    ],
    ids=str,
)
def test_every_matrix_has_draws_of_its_own(name: str, kwargs: dict[str, Any]) -> None:
    stack = nn.Parameter(torch.zeros(2, 64, 8))
    optimizer = quiet(name, [stack], **kwargs)
    for _ in range(2):
        stack.grad = torch.randn(64, 8).expand(2, 64, 8).clone()
        optimizer.step()
    assert not torch.equal(stack[0], stack[1])
