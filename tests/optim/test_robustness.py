"""Gradients and shapes that training comes upon sooner or later, for every public optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conformance import every_variant, nightly
from tests.optimizers import OPTIMIZERS, VARIANTS, WITHOUT_RANK, build

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*all get the full-rank rule", "ignore:.*kept an old basis", "ignore:.*non-finite gradient"
)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def gradient(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(shape)
    return {
        "noise": noise,
        "zero": torch.zeros(shape),
        "tied": noise[:1].expand(shape).contiguous(),
        "one entry": noise * (torch.arange(noise.numel()).view(shape) == 0),
        "tiny": noise * 1e-20,
        "large": noise * 1e12,
    }[kind].to(dtype)


def step_with(optimizer: Any, p: nn.Parameter, grad: Tensor) -> None:
    p.grad = grad
    optimizer.step()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(VARIANTS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kinds=st.lists(st.sampled_from(["noise", "zero", "tied", "one entry", "tiny", "large"]), min_size=4, max_size=4),
)
def test_weights_stay_finite_and_do_not_depend_on_strides(
    variant: tuple[str, dict[str, Any]], rows: int, columns: int, rank: int, dtype: torch.dtype, kinds: list[str]
) -> None:
    name, kwargs = variant
    start = torch.ones(rows, columns, dtype=dtype)
    params = [nn.Parameter(start.clone()), nn.Parameter(start.clone().mT.contiguous().mT)]
    optimizers = [build(name, [p], **({} if name in WITHOUT_RANK else {"rank": rank}), **kwargs) for p in params]
    for kind in kinds:
        grad = gradient(kind, (rows, columns), dtype)
        step_with(optimizers[0], params[0], grad)
        step_with(optimizers[1], params[1], grad.mT.contiguous().mT)
        for p, optimizer in zip(params, optimizers):
            assert bool(p.isfinite().all())
            assert all(bool(v.isfinite().all()) for v in optimizer.state[p].values() if isinstance(v, Tensor))


@every_variant
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1, 3], ids=["first", "between", "refresh"])
def test_a_step_with_a_non_finite_gradient_has_not_happened(
    name: str, kwargs: dict[str, Any], bad: float, at: int
) -> None:
    shapes = [(8, 6), (6, 8), (5,)]
    params, clean = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = [build(name, ps, **kwargs) for ps in (params, clean)]
    for step in range(5):
        grads = [torch.randn(shape) for shape in shapes]
        if step == at:
            for i, (p, grad) in enumerate(zip(params, grads)):
                p.grad = grad.clone()
                p.grad.view(-1)[i] = bad
            optimizers[0].step()
        for p, q, grad in zip(params, clean, grads):
            p.grad, q.grad = grad, grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, clean))


@every_variant
def test_a_zero_gradient_moves_nothing(name: str, kwargs: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.full(shape, 0.5)) for shape in [(8, 6), (6, 8), (5,)]]
    optimizer = build(name, params, weight_decay=0.0, **kwargs)
    for p in params:
        step_with(optimizer, p, torch.zeros_like(p))
        assert torch.equal(p, torch.full_like(p, 0.5))


@every_optimizer
def test_empty_parameters_are_left_alone(name: str) -> None:
    p, q = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.ones(8, 6))
    optimizer = build(name, [p, q])
    p.grad, q.grad = torch.empty(0, 8), torch.randn(8, 6)
    optimizer.step()
    assert p not in optimizer.state or not optimizer.state[p]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GaLoreAdamW", {}),
        ("LDAdamW", {}),
        *nightly(("FiraAdamW", {"moments": "rotate"}), ("LDAdamW", {"error_feedback": False})),
    ],
)
def test_a_basis_stays_orthonormal_over_a_thousand_refreshes(name: str, kwargs: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = build(name, [p], lr=1e-3, rank=6, update_proj_gap=1, **kwargs)
    for _ in range(1000):
        step_with(optimizer, p, torch.randn(24, 16))
    basis = optimizer.state[p]["basis"].double()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
