"""What is particular to FOAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import FOAM, GaLoreAdamW
from lowrank_optim.ops.fold import fold, unfold
from tests.reference.foam import foam
from tests.temporaries import CountTemporaries

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def trained(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Tensor) -> Tensor:
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(6, 11), (5, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("second_moment", "residual"), [("block", 1.0), ("mean", 0.5)])
def test_the_formulas_of_the_paper(shape: tuple[int, int], level: int, second_moment: str, residual: float) -> None:
    weight, *grads = torch.randn(9, *shape, dtype=torch.float64)
    options: dict[str, Any] = {"level": level, "scale": 0.3, "second_moment": second_moment, "residual": residual}
    expected = foam(weight, grads, **options, **SETTINGS)
    p = nn.Parameter(weight.clone())
    optimizer = FOAM([p], **options, **SETTINGS)
    for grad, after in zip(grads, expected, strict=True):
        torch.testing.assert_close(trained(optimizer, p, grad.unsqueeze(0)), after, rtol=0, atol=1e-12)


def test_without_folding_it_is_adam() -> None:
    grads, params = torch.randn(5, 6, 11), [nn.Parameter(torch.ones(6, 11)) for _ in range(2)]
    ours = trained(FOAM(params[:1], level=0, scale=1.0, **SETTINGS), params[0], grads)
    theirs = trained(GaLoreAdamW(params[1:], rank=None, **SETTINGS), params[1], grads)
    torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_is_constant_inside_of_blocks_is_that_of_the_folded_matrix() -> None:
    folded, wide, narrow = torch.randn(5, 6, 3), nn.Parameter(torch.ones(6, 11)), nn.Parameter(torch.ones(6, 3))
    moved = trained(FOAM([wide], scale=1.0, **SETTINGS), wide, unfold(folded, 4, 11))
    expected = trained(GaLoreAdamW([narrow], rank=None, **SETTINGS), narrow, folded)
    torch.testing.assert_close(moved, unfold(expected, 4, 11))


def test_folding() -> None:
    values = torch.randn(2, 6, 11)
    means = fold(values, 4)
    torch.testing.assert_close(means[..., 2], values[..., 8:].mean(-1))
    torch.testing.assert_close(fold(unfold(means, 4, 11), 4), means)
    torch.testing.assert_close(fold(values, 16), values.mean(-1, keepdim=True))
    assert fold(values, 1).equal(values)


def test_blocks_may_be_exchanged() -> None:
    grads, order = torch.randn(4, 6, 12), torch.tensor([2, 0, 1])
    columns = (4 * order.unsqueeze(1) + torch.arange(4)).flatten()
    params = [nn.Parameter(torch.ones(6, 12)) for _ in range(2)]
    plain, moved = (trained(FOAM([p]), p, g) for p, g in zip(params, (grads, grads[..., columns])))
    torch.testing.assert_close(plain[:, columns], moved)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_state_shrinks_by_the_size_of_a_block(level: int) -> None:
    p = nn.Parameter(torch.zeros(32, 64))
    optimizer = FOAM([p], level=level)
    state = optimizer.init_state(p, optimizer.param_groups[0])
    assert sum(value.nbytes for value in state.values() if isinstance(value, Tensor)) == 8 * p.numel() // 2**level


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_update_is_the_only_tensor_of_the_size_of_the_weight(device: str) -> None:
    p = nn.Parameter(torch.ones(64, 32, device=device))
    optimizer = FOAM([p], weight_decay=0.1)
    p.grad = torch.ones(64, 32, device=device)
    optimizer.init_state(p, optimizer.param_groups[0])
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    assert len(count.created) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"level": -1}, "Invalid level: -1, expected a non-negative int"),
        ({"residual": -1.0}, "Invalid residual: -1.0"),
        ({"second_moment": "sum"}, "Invalid second_moment: 'sum', expected one of 'block', 'mean'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FOAM([nn.Parameter(torch.ones(8, 8))], **kwargs)
