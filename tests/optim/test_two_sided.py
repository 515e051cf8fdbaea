"""What is particular to SinkGD, SCALE and RACS, whose update is the gradient between scales of rows and columns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import RACS, SCALE, SinkGD, low_rank_groups
from lowrank_optim.ops.two_sided import rank_one_fit, scaled_norm, sinkhorn_scales
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.reference import two_sided as reference
from tests.temporaries import CountTemporaries

SHAPES = [(14, 9), (9, 14)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def step_with(optimizer: LowRankOptimizer, p: nn.Parameter, grad: Tensor) -> Tensor:
    before = p.detach().clone()
    p.grad = grad
    optimizer.step()
    return p.detach() - before


def follows(optimizer: LowRankOptimizer, p: nn.Parameter, grads: list[Tensor], expected: list[Tensor]) -> None:
    for grad, weight in zip(grads, expected, strict=True):
        step_with(optimizer, p, grad)
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-12)


def problem(shape: tuple[int, int], steps: int = 8) -> tuple[nn.Parameter, list[Tensor]]:
    weight, *grads = torch.randn(steps + 1, *shape, dtype=torch.float64)
    return nn.Parameter(weight), grads


def balanced(matrix: Tensor, iterations: int) -> Tensor:
    rows, columns = sinkhorn_scales(matrix, iterations)
    return rows * matrix * columns


@every_shape
@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkgd_is_the_iteration_of_the_paper(shape: tuple[int, int], iterations: int) -> None:
    p, grads = problem(shape)
    options: dict[str, Any] = {"lr": 0.02, "scale": 0.3, "iterations": iterations, "weight_decay": 0.1}
    expected = reference.sinkgd(p.detach(), grads, **options)
    follows(SinkGD([p], **options), p, grads, expected)


@every_shape
@pytest.mark.parametrize("role", ["matrix", "embedding", "head"])
def test_scale_is_the_formulas_of_the_paper(shape: tuple[int, int], role: str) -> None:
    p, grads = problem(shape)
    options: dict[str, Any] = {"lr": 0.02, "beta": 0.8, "weight_decay": 0.1}
    expected = reference.scale(p.detach(), grads, role, **options)
    name = {"matrix": "layers.0.weight", "embedding": "embed_tokens.weight", "head": "lm_head.weight"}[role]
    optimizer = SCALE([(name, p), ("layers.1.weight", nn.Parameter(torch.ones(3, 3)))], **options)
    follows(optimizer, p, grads, expected)
    assert ("momentum" in optimizer.state[p]) == (role == "head")


@every_shape
@pytest.mark.parametrize("gamma", [None, 1.01])
def test_racs_is_the_formulas_of_the_paper(shape: tuple[int, int], gamma: float | None) -> None:
    p, grads = problem(shape)
    grads[5] *= 30
    options: dict[str, Any] = {"lr": 0.02, "scale": 0.3, "beta": 0.8, "iterations": 3, "weight_decay": 0.1}
    expected = reference.racs(p.detach(), grads, gamma=gamma, **options)
    follows(RACS([p], limiter_gamma=gamma, **options), p, grads, expected)


def test_rows_and_columns_have_one_norm() -> None:
    matrix = torch.randn(14, 9) * 10 ** torch.randn(14, 1) * 10 ** torch.randn(9)
    for iterations, off in ((1, 2.0), (5, 1e-1), (60, 1e-5)):
        balance = balanced(matrix, iterations)
        torch.testing.assert_close(balance.norm(), torch.tensor(14.0 * 9).sqrt())
        torch.testing.assert_close(balance.norm(dim=0), torch.full((9,), 14.0).sqrt())
        assert float((balance.norm(dim=1) - 3).abs().max()) < off
    # Sinkhorn's iteration on the squares.
    squares, goal = matrix.double().square(), balanced(matrix.double(), 5).square()
    for _ in range(5):
        squares = squares * 9 / squares.sum(1, keepdim=True)
        squares = squares * 14 / squares.sum(0, keepdim=True)
    torch.testing.assert_close(squares, goal)


def test_sinkhorn_knows_no_scale() -> None:
    matrix = torch.randn(14, 9, dtype=torch.float64)
    left = torch.diag(10 ** torch.randn(14, dtype=torch.float64))
    torch.testing.assert_close(balanced(left @ matrix, 1), balanced(matrix, 1))
    torch.testing.assert_close(balanced(1e-25 * matrix.float(), 5), balanced(matrix.float(), 5), rtol=1e-4, atol=1e-5)
    right = 10 ** torch.randn(9, dtype=torch.float64)
    off = [float((balanced(matrix * right, k) - balanced(matrix, k)).abs().max()) for k in (1, 5, 60)]
    assert off[0] > 0.1 and off[0] > off[1] > off[2] and off[2] < 1e-10
    assert torch.equal(balanced(matrix[:, :1], 1), balanced(matrix[:, :1], 5))
    torch.testing.assert_close(balanced(matrix[:, :1], 1), matrix[:, :1].sign())
    # Noise is as long in one direction as a matrix of independent entries.
    noise = balanced(torch.randn(200, 100), 5)
    assert float(torch.linalg.matrix_norm(noise, 2)) == pytest.approx(200**0.5 + 100**0.5, rel=0.05)
    # Of rank one it leaves the signs.
    ones = torch.outer(torch.randn(14), torch.randn(9))
    torch.testing.assert_close(balanced(ones, 1), ones.sign())
    assert bool((balanced(torch.zeros(4, 3), 5) == 0).all())


def test_a_bfloat16_gradient_is_balanced_in_fp32() -> None:
    matrix = torch.randn(40, 24).bfloat16()
    exact = balanced(matrix.double(), 5)
    assert float((balanced(matrix, 5) - exact).norm() / exact.norm()) < 2e-6


def test_half_an_iteration_of_sinkhorn_is_scale() -> None:
    matrix = torch.randn(14, 9, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
    moved = step_with(SCALE([p], lr=1.0), p, matrix)
    torch.testing.assert_close(-moved, 3 * matrix / matrix.norm(dim=1, keepdim=True))
    torch.testing.assert_close(moved.square().mean(1), torch.ones(14, dtype=torch.float64))


def test_a_head_without_momentum_is_a_matrix() -> None:
    weights = []
    for name in ("lm_head.weight", "layers.0.weight"):
        p = nn.Parameter(torch.zeros(14, 9))
        optimizer = SCALE([(name, p), ("layers.1.weight", nn.Parameter(torch.ones(3, 3)))], beta=0.0)
        for seed in range(3):
            step_with(optimizer, p, torch.randn(14, 9, generator=torch.Generator().manual_seed(seed)))
        weights.append(p.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight", "layers.0.weight"])
def test_where_nobody_looks_a_gradient_that_is_not_finite_only_decays(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = nn.Parameter(torch.ones(14, 9))
    optimizer = SCALE([(name, p), ("layers.1.weight", nn.Parameter(torch.ones(3, 3)))], lr=0.5, weight_decay=0.5)
    step_with(optimizer, p, torch.randn(14, 9))
    before = p.detach().clone()
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    bad = torch.randn(14, 9)
    bad[3, 4] = torch.nan
    step_with(optimizer, p, bad)
    torch.testing.assert_close(p.detach(), 0.75 * before)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.weight"])
def test_rows_and_columns_of_zeros_stay(name: str) -> None:
    p = nn.Parameter(torch.ones(14, 9))
    optimizer = SCALE([(name, p), ("layers.1.weight", nn.Parameter(torch.ones(3, 3)))], lr=0.5)
    grad = torch.randn(14, 9)
    grad[:, 2], grad[4] = 0, 0
    step_with(optimizer, p, grad)
    assert torch.equal(p.ne(1), grad.ne(0)) and p.isfinite().all()


@pytest.mark.parametrize("cls", [SCALE, RACS], ids=lambda cls: cls.__name__)
def test_a_rate_of_zero_moves_nothing(cls: type[SCALE | RACS]) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((14, 9), (9,))]
    optimizer = cls(params, lr=0.0, adamw_lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert params[0].eq(1).all() and all(p.isfinite().all() for p in params)


def test_the_momentum_of_a_head_goes_on_after_a_resume() -> None:
    def optimizer_of(p: nn.Parameter) -> SCALE:
        return SCALE([("lm_head.weight", p), ("layers.1.weight", nn.Parameter(torch.ones(3, 3)))], lr=0.1)

    whole, half = (nn.Parameter(torch.zeros(14, 9)) for _ in range(2))
    grads = torch.randn(4, 14, 9)
    one, other = optimizer_of(whole), optimizer_of(half)
    for p, optimizer, some in ((whole, one, grads), (half, other, grads[:2])):
        for grad in some:
            step_with(optimizer, p, grad)
    resumed = optimizer_of(half)
    resumed.load_state_dict(other.state_dict())
    for grad in grads[2:]:
        step_with(resumed, half, grad)
    assert torch.equal(whole, half)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mlp = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("embedding", ["columns", "head"])
def test_a_tied_embedding_is_what_the_option_says(embedding: str) -> None:
    model = Tied()
    optimizer = SCALE(low_rank_groups(model), embedding=embedding)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert ("momentum" in optimizer.state[model.embed.weight]) == (embedding == "head")
    explained = {row.name: row.method for row in optimizer.explain()}
    assert explained == {"embed.weight": "whole", "mlp.weight": "whole", "mlp.bias": "full-rank"}


def test_the_fit_of_racs_is_the_top_singular_pair_of_the_squares() -> None:
    matrix = torch.randn(14, 9, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix.square())
    best = s[0] * torch.outer(u[:, 0], vh[0])
    errors = []
    for iterations in (1, 2, 5, 40):
        rows, columns = rank_one_fit(matrix, iterations)
        errors.append(float((rows * columns - best).norm() / best.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 and errors[-1] < 1e-12
    torch.testing.assert_close(rank_one_fit(matrix, 1)[1][0], matrix.square().mean(0))
    # Another scale goes into s alone.
    scaled, ours = rank_one_fit(100 * matrix, 5), rank_one_fit(matrix, 5)
    torch.testing.assert_close(scaled, (ours[0], 1e4 * ours[1]))


def test_racs_makes_signs_of_a_gradient_whose_squares_are_of_rank_one() -> None:
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = RACS([p], lr=1.0, scale=1.0, limiter_gamma=None)
    grad = torch.outer(torch.randn(14), torch.randn(9))
    for t in range(1, 5):
        moved = step_with(optimizer, p, grad)
        torch.testing.assert_close(moved, -grad.sign() / (1 - 0.9**t))


def test_the_norm_of_racs_grows_by_gamma() -> None:
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = RACS([p], lr=1.0, scale=1.0)
    norms = [float(step_with(optimizer, p, torch.randn(14, 9) * (10 if t == 20 else 1)).norm()) for t in range(25)]
    # The first updates are larger than all others.
    assert 1.005 < norms[20] / norms[19] <= 1.01 * (1 + 1e-5)
    assert max(b / a for a, b in pairwise(norms)) <= 1.01 * (1 + 1e-5)
    rows, columns = torch.rand(14, 1), torch.rand(1, 9)
    matrix = torch.randn(14, 9)
    torch.testing.assert_close(scaled_norm(matrix, rows, columns).view(()), (rows * matrix * columns).norm())


def test_the_fit_of_zeros_is_zero() -> None:
    for iterations in (1, 3):
        assert all(not found.any() for found in rank_one_fit(torch.zeros(2, 5, 4), iterations))


def test_a_matrix_without_a_gradient_keeps_its_fit() -> None:
    p = nn.Parameter(torch.zeros(14, 9))
    optimizer = RACS([p])
    step_with(optimizer, p, torch.randn(14, 9))
    before = optimizer.state[p]["row_scale"].clone()
    step_with(optimizer, p, torch.zeros(14, 9))
    assert torch.equal(optimizer.state[p]["row_scale"], before)


@every_shape
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cls", [SinkGD, SCALE, RACS], ids=lambda cls: cls.__name__)
def test_nothing_of_the_size_of_the_weight_is_made(
    cls: type[LowRankOptimizer], shape: tuple[int, int], device: str
) -> None:
    p = nn.Parameter(torch.ones(shape, device=device))
    optimizer = cls([p], lr=1e-2, weight_decay=0.1)
    p.grad = torch.ones(shape, device=device)
    optimizer.init_state(p, optimizer.param_groups[0])
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    assert count.created == []


@pytest.mark.parametrize("cls", [SinkGD, SCALE, RACS], ids=lambda cls: cls.__name__)
def test_what_has_one_row_or_column_is_a_vector(cls: type[LowRankOptimizer]) -> None:
    """Normalised by itself, every value of it would be a sign."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((8, 1), (1, 8), (2, 2))]
    assert [row.method for row in cls(params).explain()] == ["full-rank", "full-rank", "whole"]


@pytest.mark.parametrize("cls", [SinkGD, SCALE, RACS], ids=lambda cls: cls.__name__)
def test_the_state_of_a_matrix_is_next_to_nothing(cls: type[LowRankOptimizer]) -> None:
    p = nn.Parameter(torch.zeros(64, 32))
    optimizer = cls([p])
    state = optimizer.init_state(p, optimizer.param_groups[0])
    elements = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    assert elements == (64 + 32 + 1 if cls is RACS else 0)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (SinkGD, {"iterations": 0}, "Invalid iterations: 0, expected a positive int"),
        (SinkGD, {"scale": -1.0}, "Invalid scale: -1.0"),
        (SCALE, {"embedding": "rows"}, "Invalid embedding: 'rows', expected one of 'columns', 'head'"),
        (SCALE, {"beta": 1.0}, r"Invalid beta: 1.0, expected a number in \[0, 1\)"),
        (RACS, {"limiter_gamma": 0.5}, "Invalid limiter_gamma: 0.5"),
        (RACS, {"adamw_lr": -1.0}, "Invalid adamw_lr: -1.0"),
    ],
)
def test_values_out_of_range_are_named(cls: type[LowRankOptimizer], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(8, 8))], **kwargs)
