"""The LOST layer: its start from an SVD, the choice of channels, options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim.nn import LOST, LOSTLinear, convert, reset_parameters
from tests.nn.parameterizations import block


class Start(LOSTLinear):
    """A LOST layer that starts from a known dense weight."""

    start: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, options: LOST) -> Start:
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], options)
        layer.to_empty(device="cpu")
        layer._split_(weight)
        return layer


@pytest.mark.parametrize("shape", [(20, 31), (31, 20)])
@pytest.mark.parametrize("tail_rank", [3, 256])
def test_starts_from_the_svd_of_a_full_rank_weight(shape: tuple[int, int], tail_rank: int) -> None:
    W0 = torch.randn(shape)
    with torch.no_grad():
        layer = Start.of(W0, LOST(rank=6, sparsity=0.2, tail_rank=tail_rank))
    U, S, Vh = torch.linalg.svd(W0.double(), full_matrices=False)
    assert torch.linalg.matrix_rank(W0) == 20
    torch.testing.assert_close((layer.B @ layer.A).double(), U[:, :6] * S[:6] @ Vh[:6], rtol=1e-4, atol=1e-4)
    # The balanced split: both Gram matrices are the singular values.
    torch.testing.assert_close((layer.B.T @ layer.B).double(), S[:6].diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((layer.A @ layer.A.T).double(), S[:6].diag(), rtol=1e-4, atol=1e-4)
    # Channels by the column norms of the complement, built here, scored there without it.
    end = min(6 + tail_rank, 20)
    complement = U[:, 6:end] * S[6:end] @ Vh[6:end]
    count = int(0.2 * shape[1])
    best = complement.norm(dim=0).topk(count).indices.sort().values
    assert layer.channels.tolist() == best.tolist()
    assert layer.channels.dtype == torch.int32
    # The values are the weight's own, not the complement's.
    assert torch.equal(layer.C, W0[:, best])


def test_drawn_start_has_the_deviation_asked_for() -> None:
    layer = LOST(rank=8, sparsity=0.1, std=0.5).build(200, 64)
    singular = layer.B.detach().norm(dim=0).square()
    # The largest of a Gaussian 64 x 200 matrix: std (sqrt(64) + sqrt(200)), a few percent below.
    assert 0.9 < float(singular.max()) / (0.5 * (64**0.5 + 200**0.5)) < 1.05
    assert bool((singular.diff() <= 1e-4).all())
    # The weight had full rank: its channels lie outside of what the factors span, so the tail chose them.
    left = torch.linalg.qr(layer.B.detach()).Q
    outside = layer.C - left @ (left.T @ layer.C)
    assert bool((outside.norm(dim=0) > 0.5 * layer.C.norm(dim=0)).all())


def test_one_channel_at_least() -> None:
    assert LOST(rank=2, sparsity=0.01).build(50, 10).channels.numel() == 1
    assert LOST(rank=2, sparsity=0.01).build(5461, 10).channels.numel() == 54


def test_forward_is_the_published_formula() -> None:
    layer = LOST(rank=4, sparsity=0.2, gamma=0.6, std=1.0).build(20, 15, bias=True)
    x = torch.randn(2, 7, 20)
    low = nn.functional.silu(x @ layer.A.T) @ layer.B.T
    sparse = x[..., layer.channels.long()] @ layer.C.T
    torch.testing.assert_close(layer(x), 0.6 * low + 0.4 * sparse + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_dense_weight_without_activation(gamma: float) -> None:
    layer = LOST(rank=4, sparsity=0.2, gamma=gamma, act="none", std=1.0).build(20, 15)
    x = torch.randn(9, 20)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_keeps_a_weight_as_well_as_its_parts_can(gamma: float) -> None:
    W = torch.randn(15, 20)
    layer = LOST(rank=4, sparsity=0.2, gamma=gamma, act="none").build(20, 15)
    layer.from_weight_(W)
    kept, channels = layer.dense_weight(), layer.channels.long()
    if gamma < 1:
        torch.testing.assert_close(kept[:, channels], W[:, channels], rtol=1e-4, atol=1e-4)
    tail = torch.linalg.svdvals(W)[4:].norm()
    if gamma == 1:
        torch.testing.assert_close((kept - W).norm(), tail, rtol=1e-4, atol=1e-4)
    elif gamma > 0:
        assert (kept - W).norm() < tail


def test_keeps_a_weight_through_the_activation_for_inputs_of_variance_one() -> None:
    W = torch.randn(15, 4) @ torch.randn(4, 20)
    W[:, 7] += 5 * torch.randn(15)
    layer = LOST(rank=5, sparsity=0.1).build(20, 15)
    layer.from_weight_(W)
    x = torch.randn(200, 20)
    assert (layer(x) - x @ W.T).norm() < 0.1 * (x @ W.T).norm()
    with pytest.raises(RuntimeError, match="no dense weight"):
        layer.dense_weight()


def test_same_seed_same_start_on_meta_and_in_bf16() -> None:
    def layers(model: nn.Module) -> list[LOSTLinear]:
        return [m for m in model.modules() if isinstance(m, LOSTLinear)]

    options = LOST(rank=4, sparsity=0.1)
    direct, halved = block(), block().bfloat16()
    with torch.device("meta"):
        later = block()
    for model in (direct, halved, later):
        convert(model, options, seed=5)
    later.to_empty(device="cpu")
    reset_parameters(later, seed=5)
    for a, b, c in zip(layers(direct), layers(halved), layers(later), strict=True):
        assert torch.equal(a.channels, b.channels)
        assert torch.equal(a.channels, c.channels)
        for key in ("A", "B", "C"):
            assert torch.equal(getattr(a, key), getattr(c, key))
            assert torch.equal(getattr(a, key).bfloat16(), getattr(b, key))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "Invalid rank: 0, expected a positive int"),
        ({"sparsity": 1.0}, "Invalid sparsity: 1.0, expected a number above 0 and below 1"),
        ({"gamma": 1.5}, r"Invalid gamma: 1.5, expected a number in \[0, 1\]"),
        ({"gamma": -0.1}, "Invalid gamma: -0.1"),
        ({"gamma": float("nan")}, "Invalid gamma: nan"),
        ({"act": "relu"}, "Invalid act: 'relu', expected one of 'silu', 'none'"),
        ({"tail_rank": 0}, "Invalid tail_rank: 0"),
        ({"std": -1}, "Invalid std: -1"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOST(**options)  # type: ignore[arg-type]


def test_refuses_a_rank_that_leaves_no_singular_value() -> None:
    with pytest.raises(ValueError, match="Invalid rank: 10, expected less than the smaller side"):
        LOST(rank=10).build(10, 12)
    with pytest.raises(ValueError, match="Invalid rank: 11, expected at most 10"):
        LOST(rank=11).build(10, 12)
