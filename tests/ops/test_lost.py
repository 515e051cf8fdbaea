"""LOST's product and gradients against autograd on its two separate parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowrank_optim.ops.lost import lost_linear
from tests.ops.products import Sizes, gradients, saved

GAMMA = 0.7


def problem(m: int, n: int, r: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    shapes = ((m, r), (r, n), (m, k), (m,))
    channels = torch.randperm(n)[:k].sort().values.int()
    return [torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in shapes], channels


def ours(channels: Tensor, *, silu: bool, gamma: float = GAMMA) -> Any:
    def run(x: Tensor, B: Tensor, A: Tensor, C: Tensor, b: Tensor) -> Tensor:
        return lost_linear(x, B, A, C, b, channels, gamma=gamma, silu=silu)

    return run


def apart(channels: Tensor, *, silu: bool, gamma: float = GAMMA) -> Any:
    def run(x: Tensor, B: Tensor, A: Tensor, C: Tensor, b: Tensor) -> Tensor:
        h = x @ A.T
        return gamma * (functional.silu(h) if silu else h) @ B.T + (1 - gamma) * x[..., channels.long()] @ C.T + b

    return run


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "r", "k", "tokens", "gamma"),
    [
        (5461, 33, 5, 2, (2, 3), 0.7),
        (33, 5461, 5, 54, (2, 3), 0.5),
        (33, 5461, 5, 54, (1,), 0.7),
        (9, 7, 3, 7, (4,), 0.0),
        (9, 7, 3, 1, (4,), 1.0),
        (9, 7, 3, 1, (0,), 0.7),
    ],
)
def test_equals_the_two_parts(
    m: int, n: int, r: int, k: int, tokens: tuple[int, ...], gamma: float, silu: bool
) -> None:
    parts, channels = problem(m, n, r, k)
    x, direction = torch.randn(*tokens, n, dtype=torch.float64), torch.randn(*tokens, m, dtype=torch.float64)
    expected = gradients(apart(channels, silu=silu, gamma=gamma), [x, *parts], direction)
    found = gradients(ours(channels, silu=silu, gamma=gamma), [x, *parts], direction)
    for name, a, b in zip(("y", "x", "B", "A", "C", "bias"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10, msg=name)


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu: bool) -> None:
    parts, channels = problem(7, 9, 3, 2)
    x = torch.randn(2, 3, 9, dtype=torch.float64).transpose(0, 1)
    assert torch.autograd.gradcheck(ours(channels, silu=silu), [t.requires_grad_() for t in (x, *parts)])


@pytest.mark.parametrize("trained", range(5))
def test_one_gradient_alone_equals_it_among_all(trained: int) -> None:
    parts, channels = problem(12, 10, 3, 2)
    leaves = [torch.randn(30, 10, dtype=torch.float64), *parts]
    direction = torch.randn(30, 12, dtype=torch.float64)
    everything = gradients(ours(channels, silu=True), leaves, direction)
    alone = [leaf.clone().requires_grad_(i == trained) for i, leaf in enumerate(leaves)]
    y = ours(channels, silu=True)(*alone)
    assert torch.equal(torch.autograd.grad(y, alone[trained], direction)[0], everything[1 + trained])


def test_nothing_of_the_weight_size_exists_and_references_are_saved() -> None:
    parts, channels = problem(64, 64, 4, 2)
    x = torch.randn(20, 64, dtype=torch.float64, requires_grad=True)
    parts = [part.requires_grad_() for part in parts]
    with Sizes() as sizes, saved() as tensors:
        y = ours(channels, silu=True)(x, *parts)
        torch.autograd.grad(y, [x, *parts], torch.randn_like(y))
    assert max(sizes.seen) <= 20 * 64
    assert {t.data_ptr() for t in tensors} <= {t.data_ptr() for t in (x, *parts, channels)}
    assert len(tensors) == 5


@pytest.mark.parametrize("silu", [True, False])
def test_bf16_is_as_close_to_exact_as_the_two_parts(silu: bool) -> None:
    parts, channels = problem(96, 64, 8, 3, torch.bfloat16)
    leaves = [torch.randn(200, 64).bfloat16(), *parts]
    direction = torch.randn(200, 96).bfloat16()
    exact = gradients(apart(channels, silu=silu), [leaf.double() for leaf in leaves], direction.double())
    found = gradients(ours(channels, silu=silu), leaves, direction)
    reference = gradients(apart(channels, silu=silu), leaves, direction)
    for name, a, b, c in zip(("y", "x", "B", "A", "C", "bias"), found, reference, exact, strict=True):
        # The concatenation rounds gamma B and (1 - gamma) C; the parts round their products instead.
        assert (a.double() - c).norm() <= 1.25 * (b.double() - c).norm() + 1e-3 * c.norm(), name


def test_autocast_casts_inside_and_keeps_no_copies() -> None:
    parts, channels = problem(64, 48, 4, 2, torch.float32)
    x = torch.randn(40, 48, requires_grad=True)
    parts = [part.requires_grad_() for part in parts]
    with torch.autocast("cpu", dtype=torch.bfloat16), saved() as tensors:
        y = ours(channels, silu=True)(x, *parts)
    assert y.dtype == torch.bfloat16
    assert {t.data_ptr() for t in tensors} <= {t.data_ptr() for t in (x, *parts, channels)}
    y.backward(torch.randn_like(y))
    exact = apart(channels, silu=True)(x, *parts).detach()
    assert (y.detach() - exact).norm() < 0.01 * exact.norm()
    for leaf in (x, *parts):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="the compiler of torch 2.6 cannot trace torch.is_autocast_available"
)
def test_compiles_into_one_graph() -> None:
    parts, channels = problem(24, 33, 4, 2, torch.float32)
    leaves = [torch.randn(64, 33), *parts]
    direction = torch.randn(64, 24)
    torch._dynamo.reset()
    compiled = torch.compile(ours(channels, silu=True), backend="aot_eager", fullgraph=True)
    for a, b in zip(
        gradients(compiled, leaves, direction), gradients(ours(channels, silu=True), leaves, direction), strict=True
    ):
        torch.testing.assert_close(a, b)
