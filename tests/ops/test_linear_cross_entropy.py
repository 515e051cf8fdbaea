"""Head and loss together against torch's linear and cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.memory_probe import peak_bytes
from lowrank_optim.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.products import Sizes


def problem(tokens: int, words: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(words, width).to(dtype).requires_grad_()
    targets = torch.randint(words, (tokens,))
    targets[::3] = -100
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
    arguments.pop("chunk", None)
    return functional.cross_entropy(hidden @ weight.t(), targets, **arguments)


def run(
    f: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any
) -> tuple[Tensor, ...]:
    loss = f(hidden, weight, targets, **arguments)
    weights = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), weights)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    ("tokens", "words", "width", "chunk"),
    [(5461, 7, 3, 512), (37, 101, 5, 8), (4, 33, 2, 512), (9, 1, 4, 2), (1, 50, 3, 1), (50, 3, 2, 1)],
)
def test_equals_cross_entropy(tokens: int, words: int, width: int, chunk: int, reduction: str) -> None:
    args = problem(tokens, words, width)
    # The targets of the only word of a vocabulary may all be ignored.
    args[2][-1] = 0
    found = run(linear_cross_entropy, *args, chunk=chunk, reduction=reduction)
    for ours, theirs in zip(found, run(reference, *args, reduction=reduction), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_another_ignore_index_and_nothing_that_counts() -> None:
    hidden, weight, targets = problem(20, 11, 3)
    targets = targets.clamp_min(0)
    for ignored, chosen in ((4, targets), (7, torch.full_like(targets, 7))):
        found = run(linear_cross_entropy, hidden, weight, chosen, ignore_index=ignored, chunk=3)
        expected = run(reference, hidden, weight, chosen, ignore_index=ignored, reduction="sum")
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs)
    assert linear_cross_entropy(hidden, weight, chosen, ignore_index=7, reduction="mean").isnan()
    empty = run(linear_cross_entropy, hidden[:0], weight, targets[:0])
    assert [float(value.abs().sum()) for value in empty] == [0, 0, 0]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction: str) -> None:
    hidden, weight, targets = problem(7, 9, 3)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, chunk=2, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("trained", [0, 1])
def test_one_gradient_alone_equals_it_among_both(trained: int) -> None:
    hidden, weight, targets = problem(13, 29, 4)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=4), (hidden, weight))
    leaves = [leaf.detach().requires_grad_(i == trained) for i, leaf in enumerate((hidden, weight))]
    alone = torch.autograd.grad(linear_cross_entropy(*leaves, targets, chunk=4), leaves[trained])
    assert torch.equal(alone[0], both[trained])


def in_fp32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [0.2, 3.0])
def test_as_close_to_exact_as_the_head_in_the_same_dtype(dtype: torch.dtype, magnitude: float) -> None:
    hidden, weight, targets = problem(600, 257, 33, dtype)
    hidden = (hidden * magnitude).detach().requires_grad_()
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    exact = run(reference, *wide, targets)
    theirs = run(in_fp32, hidden, weight, targets)
    ours = run(linear_cross_entropy, hidden, weight, targets, reduction="mean", chunk=16)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    # The logits are computed twice, in products of two shapes: fp32 differs by roundings of the largest.
    again = float((hidden @ weight.t()).detach().abs().max()) * 2**-24
    for name, a, b, c in zip(("loss", "hidden", "weight"), ours, theirs, exact):
        assert (a.double() - c).norm() <= 1.25 * (b.double() - c).norm() + again * c.norm(), name


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(12, 40, 4, torch.float32)
    hidden = (hidden * 1e4).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, chunk=5, reduction="mean")
    torch.testing.assert_close(loss, in_fp32(hidden, weight, targets))
    # To a rounding of such logits, which are computed twice.
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients() -> None:
    hidden, weight, targets = problem(40, 65, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=7)
        expected = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_no_more_logits_than_a_chunk_exist() -> None:
    hidden, weight, targets = problem(96, 640, 4, torch.float32)
    with Sizes() as sizes:
        linear_cross_entropy(hidden, weight, targets, chunk=8).backward()
    assert max(sizes.seen) == 8 * 640
    chunk = 4 * 8 * 640

    def step() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=8), (hidden, weight))

    # Two copies of a chunk, both gradients and the product that is added to one, and some numbers a token.
    assert peak_bytes(step, torch.device("cpu")) <= 2 * chunk + weight.nbytes + 3 * hidden.nbytes + 96 * 64


def test_runs_on_fake_tensors_and_saves_references() -> None:
    with FakeTensorMode():
        hidden = torch.empty(4096, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(256_000, 64, dtype=torch.bfloat16, requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, torch.empty(4096, dtype=torch.int64))
        loss.backward()
        assert loss.dtype == torch.float32 and weight.grad is not None and weight.grad.shape == weight.shape


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="the compiler of torch 2.6 cannot trace torch.is_autocast_available"
)
def test_compiles_into_one_graph() -> None:
    args = problem(20, 33, 6, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, *args, chunk=6), run(linear_cross_entropy, *args, chunk=6), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets = problem(6, 5, 2)
    with pytest.raises(ValueError, match="shapes \\(6, 2\\) and \\(5,\\), expected"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="shapes \\(6, 1, 2\\) and \\(6,\\), expected"):
        linear_cross_entropy(hidden.unsqueeze(1), weight, targets)
    with pytest.raises(ValueError, match="Invalid chunk: 0"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="Invalid reduction: 'max', expected one of 'sum'"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
