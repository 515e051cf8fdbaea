"""The layer of SST: what it computes, what it keeps for the backward pass, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import NewTensors
from lowrank_optim.nn import SST, SSTLinear, convert, merge
from lowrank_optim.ops.spectral_linear import spectral_linear, through_weight
from lowrank_optim.ops.triplets import Triplets, activate_, compose, decompose_, draw_slots
from tests.nn.sst_training import loss_of, make, train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(n: int, m: int, rank: int, *, bias: bool = False, dtype: torch.dtype = torch.float64, **options) -> SSTLinear:
    return SST(rank, **options).build(n, m, bias=bias, dtype=dtype, generator=generator())


def reference(x: Tensor, parts: Triplets) -> Tensor:
    u, v = torch.cat([parts.u, parts.u_frozen], 1), torch.cat([parts.v, parts.v_frozen], 1)
    return x @ (u @ torch.diag(parts.s) @ v.mT).mT


SHAPES = pytest.mark.parametrize(("n", "m", "rank"), [(7, 5, 2), (5, 7, 3), (6, 6, 6), (9, 1, 1)], ids=str)
# By the parts alone, and with W in between.
TOKENS = pytest.mark.parametrize("tokens", [(2, 3), (2, 7)], ids=["few tokens", "many tokens"])


@SHAPES
@TOKENS
def test_gradcheck(n: int, m: int, rank: int, tokens: tuple[int, int]) -> None:
    assert through_weight(tokens[0] * tokens[1], m, n, min(m, n)) == (tokens == (2, 7))
    parts = [p.detach().clone().requires_grad_(p.requires_grad) for p in layer(n, m, rank).parts]
    x = torch.randn(*tokens, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *ps: spectral_linear(x, *ps, enhanced=False), (x, *parts))
    torch.testing.assert_close(spectral_linear(x, *parts, enhanced=True), reference(x, Triplets(*parts)))


@SHAPES
@TOKENS
def test_enhanced_gradients_lack_the_singular_values(n: int, m: int, rank: int, tokens: tuple[int, int]) -> None:
    x, g = torch.randn(*tokens, n, dtype=torch.float64), torch.randn(*tokens, m, dtype=torch.float64)
    lin = layer(n, m, rank)
    lin(x).backward(g)
    dense = g.flatten(0, 1).mT @ x.flatten(0, 1)
    torch.testing.assert_close(lin.u.grad, dense @ lin.v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lin.v.grad, dense.mT @ lin.u, rtol=1e-12, atol=1e-12)
    u, v = torch.cat([lin.u, lin.u_frozen], 1), torch.cat([lin.v, lin.v_frozen], 1)
    torch.testing.assert_close(lin.s.grad, (u * (dense @ v)).sum(0), rtol=1e-12, atol=1e-12)
    assert lin.u_frozen.grad is None and lin.v_frozen.grad is None


@pytest.mark.parametrize("trained", ["x", "u", "s", "v"])
@TOKENS
def test_one_gradient_alone_equals_it_among_all(trained: str, tokens: tuple[int, int]) -> None:
    lin = layer(7, 5, 2)
    x = torch.randn(*tokens, 7, dtype=torch.float64)
    leaves = dict(zip(("x", "u", "s", "v"), (x, lin.u.detach(), lin.s.detach(), lin.v.detach())))

    def grads(names: tuple[str, ...]) -> dict[str, Tensor]:
        chosen = {key: leaf.clone().requires_grad_(key in names) for key, leaf in leaves.items()}
        y = spectral_linear(*chosen.values(), lin.u_frozen, lin.v_frozen, enhanced=True)
        found = torch.autograd.grad(y.sin().sum(), [chosen[name] for name in names])
        return dict(zip(names, found))

    torch.testing.assert_close(grads((trained,))[trained], grads(("x", "u", "s", "v"))[trained])


def test_of_the_gradient_of_the_weight_a_block_exists() -> None:
    n, m, tokens = 40, 48, 500
    lin = layer(n, m, 4)
    x, g = torch.randn(tokens, n, dtype=torch.float64), torch.randn(tokens, m, dtype=torch.float64)
    y = lin(x)
    assert through_weight(tokens, m, n, 40)
    with NewTensors(m * n) as new:
        y.backward(g, inputs=[lin.u, lin.s, lin.v])
    assert new.count == 0


@pytest.mark.parametrize("enhanced", [True, False])
@TOKENS
def test_nothing_of_the_size_of_the_weight_is_saved(enhanced: bool, tokens: tuple[int, int]) -> None:
    n, m, rank = 16, 24, 4
    lin = layer(n, m, rank, dtype=torch.float32, enhanced=enhanced)
    own = {p.data_ptr() for p in lin.parameters() if p.numel()}
    saved: list[Tensor] = []
    x = torch.randn(*tokens, n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lin(x)
    others = [t for t in saved if t.data_ptr() not in own]
    assert [t.data_ptr() for t in others] == [x.data_ptr()]
    y.sum().backward()


@TOKENS
def test_autocast_matches_a_dense_layer_under_autocast(tokens: tuple[int, int]) -> None:
    lin = layer(16, 12, 4, bias=True, dtype=torch.float32)
    x = torch.randn(*tokens, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lin(x)
        dense = nn.functional.linear(x, lin.dense_weight(), lin.bias)
    assert y.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense.float(), rtol=0.05, atol=0.01)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in (lin.u, lin.s, lin.v, x))


@SHAPES
def test_another_sample_leaves_the_weight(n: int, m: int, rank: int) -> None:
    lin = layer(n, m, rank)
    before, order = lin.dense_weight(), torch.arange(lin.s.numel(), dtype=torch.float64)
    original = lin.s.detach().clone()
    for seed in range(5):
        with torch.no_grad():
            slots = draw_slots(lin.s, rank, generator(seed))
            chosen = lin.s[slots]
            activate_(lin.parts, slots, order)
        assert torch.equal(lin.s[:rank].sort().values, chosen.sort().values)
        # What lies beside s moves with it.
        assert torch.equal(lin.s, original[order.long()])
        torch.testing.assert_close(lin.dense_weight(), before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_decomposition_leaves_the_weight_and_sorts(dtype: torch.dtype) -> None:
    lin = layer(9, 14, 4, dtype=dtype)
    with torch.no_grad():
        lin.u.add_(0.1 * torch.randn(lin.u.shape, generator=generator()))
        lin.s.add_(0.01)
        before = compose(lin.parts)
        assert decompose_(lin.parts, before)
    torch.testing.assert_close(compose(lin.parts), before, rtol=0, atol={torch.bfloat16: 2e-2}.get(dtype, 1e-6))
    assert torch.equal(lin.s, lin.s.sort(descending=True).values)
    u = torch.cat([lin.u, lin.u_frozen], 1).double()
    torch.testing.assert_close(
        u.mT @ u, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-5 if lin.u.element_size() > 2 else 2e-2
    )
    kept = [p.detach().clone() for p in lin.parts]
    assert not decompose_(lin.parts, torch.full((14, 9), float("nan")))
    assert all(torch.equal(p, k) for p, k in zip(lin.parts, kept))


def test_draws_are_half_uniform_half_by_value() -> None:
    s = torch.tensor([6.0, 3.0, 1.0, 0.0, 0.0])
    counts, g, n = torch.zeros(5), generator(), 6_000
    for _ in range(n):
        counts[draw_slots(s, 1, g)] += 1
    torch.testing.assert_close(counts / n, (0.2 + s / 10) / 2, rtol=0, atol=0.02)
    assert draw_slots(torch.zeros(5), 5, g).tolist() == [0, 1, 2, 3, 4]
    assert draw_slots(torch.tensor([1.0, float("nan")]), 1, g) is None


def test_initial_weight_and_sample() -> None:
    lin = layer(300, 200, 20, dtype=torch.float32)
    assert float(lin.dense_weight().std()) == pytest.approx(0.02, rel=0.02)
    # A sample, not the largest values.
    assert bool(lin.s[:20].min() < lin.s[20:].max())
    again = layer(300, 200, 20, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(lin.parameters(), again.parameters()))


def test_merge_after_training_gives_the_same_logits() -> None:
    model, optimizer = make()
    losses = train(model, optimizer, 0, 60)
    assert losses[-1] < losses[0] - 0.5
    tokens = torch.randint(0, 30, (2, 5))
    before = model(tokens)
    merge(model)
    assert not any(isinstance(module, SSTLinear) for module in model.modules())
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-4)


def test_other_optimizers_train_the_first_sample() -> None:
    model, _ = make()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = train(model, optimizer, 0, 40)
    assert float(loss_of(model, 99).detach()) < losses[0] - 0.5
    assert frozen and all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)


def test_clear_errors() -> None:
    for rank in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"Invalid rank: {rank}, expected a positive int"):
            SST(rank)
    with pytest.raises(ValueError, match="Invalid std: -1"):
        SST(4, std=-1)
    with pytest.raises(ValueError, match="Invalid rank: 9, expected at most 5"):
        SST(9).build(5, 11, bias=False)
    model, _ = make()
    with pytest.raises(ValueError, match="already a SSTLinear"):
        convert(model, SST(rank=3))
    with pytest.raises(ValueError, match=r"shape \(4, 4\), expected \(5, 7\)"):
        layer(7, 5, 2).from_weight_(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="no singular value decomposition"):
        layer(7, 5, 2).from_weight_(torch.full((5, 7), float("inf")))


def test_a_weight_is_composed_in_a_wide_dtype() -> None:
    parts = Triplets(*(torch.randn(shape).bfloat16() for shape in ((9, 2), (6,), (6, 2), (9, 4), (6, 4))))
    exact = compose(Triplets(*(part.double() for part in parts)))
    weight = compose(parts)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)
