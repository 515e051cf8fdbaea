"""SLTrain's product and gradients against autograd on the dense expression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory_probe import peak_bytes
from lowrank_optim.ops.sltrain import (
    BLOCKS,
    sddmm_operator,
    sltrain_gradients,
    sltrain_linear,
    sltrain_weight,
    sltrain_weight_operator,
)
from lowrank_optim.ops.support import draw_positions, empty_support, pack_
from tests.ops.products import Sizes, gradients, saved

SCALE = 0.37


def problem(m: int, n: int, r: int, sparsity: float = 0.05, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    count = int(sparsity * m * n)
    flat = draw_positions((m, n), count)
    index, row_pointers = empty_support((m, n), count, None)
    pack_(index, row_pointers, flat, (m, n))
    return {
        "flat": flat,
        "index": index,
        "row_pointers": row_pointers,
        "parts": [
            (torch.randn(*shape, dtype=torch.float64) * n**-0.5).to(dtype) for shape in ((m, r), (r, n), (count,), (m,))
        ],
    }


def ours(p: dict[str, Any], *, bias: bool = True) -> Any:
    def run(x: Tensor, B: Tensor, A: Tensor, values: Tensor, b: Tensor) -> Tensor:
        return sltrain_linear(x, B, A, values, b if bias else None, p["index"], p["row_pointers"], scale=SCALE)

    return run


def dense(p: dict[str, Any]) -> Any:
    def run(x: Tensor, B: Tensor, A: Tensor, values: Tensor, b: Tensor) -> Tensor:
        S = torch.zeros(B.shape[0] * A.shape[1], dtype=B.dtype).index_put((p["flat"],), values)
        return functional.linear(x, SCALE * B @ A + S.view(B.shape[0], A.shape[1]), b)

    return run


# Odd sizes first; the last two numbers choose gradients from blocks of G or from x and g, and the packing.
@pytest.mark.parametrize(
    ("m", "n", "r", "tokens", "sparsity"),
    [
        (5461, 33, 5, (2, 40), 0.05),
        (33, 5461, 5, (2, 40), 0.05),
        (33, 5461, 5, (1,), 0.05),
        (3, 7, 2, (50,), 0.2),
        (1, 50, 1, (4,), 0.1),
        (17, 23, 4, (2, 3, 5), 0.5),
        (64, 48, 8, (0,), 0.05),
    ],
)
def test_equals_the_dense_expression(m: int, n: int, r: int, tokens: tuple[int, ...], sparsity: float) -> None:
    p = problem(m, n, r, sparsity)
    x = torch.randn(*tokens, n, dtype=torch.float64)
    direction = torch.randn(*tokens, m, dtype=torch.float64)
    expected = gradients(dense(p), [x, *p["parts"]], direction)
    found = gradients(ours(p), [x, *p["parts"]], direction)
    for name, a, b in zip(("y", "x", "B", "A", "values", "bias"), found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("sparsity", [0.03, 0.3])
def test_gradcheck(tokens: int, sparsity: float) -> None:
    p = problem(7, 9, 3, sparsity)
    x = torch.randn(tokens, 9, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *p["parts"])]
    assert torch.autograd.gradcheck(ours(p), leaves)


def test_strided_input_and_expanded_gradient() -> None:
    p = problem(12, 10, 3, 0.1)
    x = torch.randn(10, 6, 4, dtype=torch.float64).transpose(0, 2)
    direction = torch.ones((), dtype=torch.float64).expand(4, 6, 12)
    for a, b in zip(
        gradients(ours(p), [x, *p["parts"]], direction), gradients(dense(p), [x, *p["parts"]], direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", range(5))
def test_one_gradient_alone_equals_it_among_all(trained: int) -> None:
    p = problem(12, 10, 3, 0.1)
    leaves = [torch.randn(30, 10, dtype=torch.float64), *p["parts"]]
    direction = torch.randn(30, 12, dtype=torch.float64)
    everything = gradients(ours(p), leaves, direction)
    alone = [leaf.clone().requires_grad_(i == trained) for i, leaf in enumerate(leaves)]
    y = ours(p)(*alone)
    assert torch.equal(torch.autograd.grad(y, alone[trained], direction)[0], everything[1 + trained])


@pytest.mark.parametrize("tokens", [40, 20], ids=["from blocks of G", "from x and g"])
def test_no_dense_gradient_exists(tokens: int) -> None:
    p = problem(64, 64, 4)
    B, A, values, _ = p["parts"]
    x, g = torch.randn(tokens, 64, dtype=torch.float64), torch.randn(tokens, 64, dtype=torch.float64)
    with Sizes() as sizes:
        sltrain_gradients(g, x, B, A, p["index"], p["row_pointers"], count=values.numel(), scale=SCALE)
    assert max(sizes.seen) <= max(64 * 64 // BLOCKS, tokens * 64)
    assert max(sizes.seen) < 64 * 64


def test_one_dense_weight_exists_at_a_time() -> None:
    p = problem(256, 256, 4)
    leaves = [t.requires_grad_() for t in (torch.randn(140, 256, dtype=torch.float64), *p["parts"])]
    weight, tokens, values = 8 * 256 * 256, 8 * 140 * 256, 8 * p["flat"].numel()
    y = ours(p)(*leaves)
    direction = torch.randn_like(y)
    forward = peak_bytes(lambda: ours(p)(*leaves), torch.device("cpu"))
    backward = peak_bytes(lambda: torch.autograd.grad(y, leaves, direction), torch.device("cpu"))
    # Beside W and the result: the factors' gradients and what the positions of the values take.
    assert weight < forward <= weight + tokens + 4 * values
    assert weight < backward <= weight + tokens + 4 * values


def test_saves_references_only() -> None:
    p = problem(64, 48, 4)
    x = torch.randn(2, 20, 48, dtype=torch.float64, requires_grad=True)
    parts = [part.requires_grad_() for part in p["parts"]]
    with saved() as tensors:
        ours(p)(x, *parts)
    inputs = {t.data_ptr() for t in (x, *parts, p["index"], p["row_pointers"])}
    assert {t.data_ptr() for t in tensors} <= inputs
    assert len(tensors) == 6
    assert all(t.numel() != 64 * 48 for t in tensors)


def test_weight_adds_both_parts_where_they_overlap() -> None:
    p = problem(5, 6, 2, 0.2)
    B, A, values, _ = p["parts"]
    W = sltrain_weight(B, A, values, p["index"], p["row_pointers"], scale=SCALE)
    S = W - SCALE * B @ A
    torch.testing.assert_close(S.view(-1)[p["flat"]], values)
    assert int((S.abs() > 1e-14).sum()) == values.numel()


def test_bf16_is_as_close_to_exact_as_the_dense_product() -> None:
    p = problem(96, 64, 8, 0.05, torch.bfloat16)
    leaves = [torch.randn(200, 64).bfloat16(), *p["parts"]]
    direction = torch.randn(200, 96).bfloat16()
    exact = gradients(dense(p), [leaf.double() for leaf in leaves], direction.double())
    found = gradients(ours(p), leaves, direction)
    reference = gradients(dense(p), leaves, direction)
    for name, a, b, c in zip(("y", "x", "B", "A", "values", "bias"), found, reference, exact, strict=True):
        assert a.dtype == torch.bfloat16
        # A quarter more than autograd's own bf16 error: both round W, ours in other places.
        assert (a.double() - c).norm() <= 1.25 * (b.double() - c).norm() + 1e-3 * c.norm(), name


def test_autocast_casts_inside_and_keeps_no_copies() -> None:
    p = problem(64, 48, 4, 0.05, torch.float32)
    x = torch.randn(40, 48, requires_grad=True)
    parts = [part.requires_grad_() for part in p["parts"]]
    with torch.autocast("cpu", dtype=torch.bfloat16), saved() as tensors:
        y = ours(p)(x, *parts)
    assert y.dtype == torch.bfloat16
    assert {t.data_ptr() for t in tensors} <= {t.data_ptr() for t in (x, *parts, p["index"], p["row_pointers"])}
    y.backward(torch.randn_like(y))
    for leaf in (x, *parts):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), dense(p)(x, *parts).detach(), rtol=0.02, atol=0.02)


def test_mixed_dtypes_are_refused_as_by_linear() -> None:
    p = problem(8, 8, 2, 0.1, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(p)(torch.randn(3, 8), *p["parts"])


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="the compiler of torch 2.6 cannot trace torch.is_autocast_available"
)
def test_compiles_into_one_graph() -> None:
    p = problem(24, 33, 4, 0.05, torch.float32)
    leaves = [torch.randn(64, 33), *p["parts"]]
    direction = torch.randn(64, 24)
    torch._dynamo.reset()
    compiled = torch.compile(ours(p), backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, leaves, direction), gradients(ours(p), leaves, direction), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.05, 0.3])
def test_what_a_compiler_is_told_about_the_operators_is_true(sparsity: float, dtype: torch.dtype) -> None:
    p = problem(70, 300, 5, sparsity, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    B, A, values, index, row_pointers = (t.to(device) for t in (*p["parts"][:3], p["index"], p["row_pointers"]))
    torch.library.opcheck(sltrain_weight_operator, (B, A, values, index, row_pointers, SCALE))
    grad, x = torch.randn(6, 70, device=device).to(dtype), torch.randn(6, 300, device=device).to(dtype)
    torch.library.opcheck(sddmm_operator, (grad, x, index, row_pointers, values.numel()))


def test_the_sum_over_blocks_is_not_rounded_between_them() -> None:
    """1 and three times 2^-9, each of which bfloat16 would drop."""
    empty = empty_support((4, 2), 0, None)
    grad, x = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16)
    grad[0], x[0] = torch.tensor([1.0, *[2.0**-9] * 3]), 1.0
    ones = torch.ones(4, 1, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    dA = sltrain_gradients(grad, x, *ones, *empty, count=0, scale=1.0)[1]
    assert BLOCKS == 4 and dA.dtype == torch.bfloat16 and dA.eq(1 + 2.0**-7).all()
