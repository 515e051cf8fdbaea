"""What is particular to APOLLO: sketches that are made anew, channels, the two granularities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import APOLLOAdamW, APOLLOMini
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.subspaces.random import Gaussian, overlap_of
from tests.reference.apollo import apollo


def step_with(optimizer: LowRankOptimizer, p: nn.Parameter, grad: Tensor) -> None:
    p.grad = grad
    optimizer.step()


def sketch_of(optimizer: LowRankOptimizer, p: nn.Parameter) -> Tensor:
    """The present sketch, (d, rank)."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    subspace = optimizer.parts_of(p, group).subspace
    assert isinstance(subspace, Gaussian)
    return subspace.basis(subspace.orient(p.detach(), state), state, group)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (10, 10)], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(("scale_front", "gamma"), [(False, 1.01), (True, 1.2), (False, None)])
def test_the_formulas_of_the_paper(
    shape: tuple[int, int], scale_type: str, scale_front: bool, gamma: float | None
) -> None:
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "scale": 3.0}
    common |= {"scale_type": scale_type, "scale_front": scale_front}
    weight = torch.randn(shape, dtype=torch.float64)
    grads = [torch.randn(shape, dtype=torch.float64) * (6 if i == 7 else 1) for i in range(14)]
    p = nn.Parameter(weight.clone())
    optimizer = APOLLOAdamW([p], rank=3, update_proj_gap=5, limiter_gamma=gamma, **common)
    trajectory, sketches = [], []
    for i, grad in enumerate(grads):
        step_with(optimizer, p, grad)
        trajectory.append(p.detach().clone())
        if i % 5 == 0:
            sketches.append(sketch_of(optimizer, p))
    expected = apollo(weight, grads, sketches, gap=5, gamma=gamma, **common)
    torch.testing.assert_close(torch.stack(trajectory), torch.stack(expected), rtol=0, atol=1e-12)


def test_nothing_of_the_sketch_is_stored() -> None:
    p = nn.Parameter(torch.ones(40, 24))
    optimizer = APOLLOAdamW([p], rank=4)
    step_with(optimizer, p, torch.randn(40, 24))
    tensors = {key: tuple(value.shape) for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
    assert tensors == {"exp_avg": (40, 4), "exp_avg_sq": (40, 4), "update_norm": ()}


def test_a_sketch_depends_on_position_and_refresh_alone() -> None:
    def train(neighbour: tuple[int, int], draws: int, steps: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(draws)
        torch.rand(draws)
        other, p = nn.Parameter(torch.ones(neighbour)), nn.Parameter(torch.zeros(30, 20))
        optimizer = APOLLOAdamW([other, p], rank=4, update_proj_gap=2)
        for step in range(steps):
            other.grad = torch.ones(neighbour) if step % 2 else None
            step_with(optimizer, p, torch.randn(30, 20, generator=torch.Generator().manual_seed(step)))
        return p.detach(), sketch_of(optimizer, p)

    for steps in (1, 5):
        (weight, sketch), (same_weight, same_sketch) = train((50, 40), 1, steps), train((9, 7), 7, steps)
        assert torch.equal(sketch, same_sketch) and torch.equal(weight, same_weight)
    assert torch.equal(train((9, 7), 1, 1)[1], train((9, 7), 1, 2)[1])
    assert not torch.equal(train((9, 7), 1, 1)[1], train((9, 7), 1, 3)[1])


def test_layers_of_one_shape_have_different_sketches() -> None:
    params = [nn.Parameter(torch.zeros(30, 20)) for _ in range(2)]
    optimizer = APOLLOAdamW(params, rank=4)
    for p in params:
        p.grad = torch.ones(30, 20)
    optimizer.step()
    first, second = (sketch_of(optimizer, p) for p in params)
    assert float((first - second).abs().mean()) > 0.3


def test_a_group_that_joins_late_has_a_sketch() -> None:
    """The published optimizer raises KeyError: its seeds are given out in the constructor."""
    p, q = nn.Parameter(torch.zeros(30, 20)), nn.Parameter(torch.zeros(30, 20))
    optimizer = APOLLOAdamW([p], rank=4)
    optimizer.add_param_group({"params": [q], "rank": 4})
    step_with(optimizer, q, torch.randn(30, 20))
    assert optimizer.state[q]["seed"] == 1 and float(q.detach().abs().sum()) > 0


def test_a_copy_draws_what_the_original_draws() -> None:
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = APOLLOAdamW([p], rank=4, update_proj_gap=1)
    step_with(optimizer, p, torch.randn(30, 20))
    clone = copy.deepcopy(optimizer)
    q = clone.param_groups[0]["params"][0]
    grad = torch.randn(30, 20)
    step_with(optimizer, p, grad)
    step_with(clone, q, grad)
    assert torch.equal(sketch_of(optimizer, p), sketch_of(clone, q)) and torch.equal(p, q)


def test_a_capturable_optimizer_draws_the_same() -> None:
    params = [nn.Parameter(torch.zeros(30, 20)) for _ in range(2)]
    optimizers = [APOLLOAdamW([p], rank=4, update_proj_gap=2, capturable=c) for p, c in zip(params, (False, True))]
    for _ in range(5):
        grad = torch.randn(30, 20)
        for optimizer, p in zip(optimizers, params):
            step_with(optimizer, p, grad)
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=str)
def test_channels_lie_on_the_side_that_is_not_compressed(proj_type: str, shape: tuple[int, int]) -> None:
    """The update is the gradient times one factor a channel; the published code crashes or mixes the axes up."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = APOLLOAdamW([p], rank=3, proj_type=proj_type)
    grad = torch.randn(shape)
    step_with(optimizer, p, grad)
    ratio = p.detach() / grad
    axis = 0 if optimizer.state[p]["left"] else 1
    torch.testing.assert_close(ratio, ratio.mean(axis, keepdim=True).expand(shape), rtol=1e-4, atol=0)
    assert float(ratio.std()) > 1e-3 * float(ratio.abs().mean())


def test_mini_is_apollo_of_rank_one_by_tensor() -> None:
    p, q = (nn.Parameter(torch.zeros(12, 7)) for _ in range(2))
    mini, full = APOLLOMini([p]), APOLLOAdamW([q], rank=1, scale=128.0, scale_type="tensor")
    for _ in range(4):
        grad = torch.randn(12, 7)
        step_with(mini, p, grad)
        step_with(full, q, grad)
    assert torch.equal(p, q)
    assert mini.state[p]["exp_avg"].numel() == 12


def test_rotated_moments_are_the_best_guess_in_the_new_sketch() -> None:
    old, new = (torch.randn(20, 6, dtype=torch.float64) for _ in range(2))
    overlap = overlap_of(old, new, "rotate")
    assert overlap is not None
    torch.testing.assert_close(overlap, torch.linalg.pinv(old) @ new)
    # A vector of the old sketch's span loses nothing.
    full = torch.randn(3, 6, dtype=torch.float64) @ old.mT
    torch.testing.assert_close(full @ old @ overlap, full @ new)
    signs = overlap_of(old, torch.cat([-old[:, :3], old[:, 3:]], dim=1), "align")
    torch.testing.assert_close(signs, torch.tensor([-1.0] * 3 + [1.0] * 3, dtype=torch.float64).diag())


def test_up_returns_the_gradient_on_average() -> None:
    subspace, group = Gaussian(), {"rank": 64, "backend": None}
    grad, total = torch.randn(3, 10), torch.zeros(3, 10)
    for draw in range(200):
        state = {"seed": 0, "refreshes": draw, "left": False, "rank": 64}
        low = subspace.project(grad, state, group)
        subspace.project_back_(total, low, state, group, alpha=1 / 200)
    assert float((total - grad).norm() / grad.norm()) < 0.05


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": -1}, "Invalid scale: -1"),
        ({"proj": "qr"}, "Invalid proj: 'qr', expected one of 'random', 'svd'"),
        ({"scale_type": "row"}, "Invalid scale_type: 'row', expected one of 'channel', 'tensor'"),
        ({"limiter_gamma": "off"}, "Invalid limiter_gamma: 'off'"),
        ({"proj_type": "full"}, "Invalid proj_type: 'full'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APOLLOAdamW([nn.Parameter(torch.ones(8, 6))], rank=2, **kwargs)
