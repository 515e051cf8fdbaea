"""Updates far below the resolution of a bfloat16 weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.ops.rounding import join_24_bits
from tests.conformance import nightly

SPACING = 2.0**-7  # of bfloat16 numbers between 1 and 2


def drift(weight_rounding: str, share: float, *, rank: int | None = None, steps: int = 200) -> float:
    """Realised over intended mean change of weights that move by ``share`` of the bfloat16 spacing a step."""
    start = 1.5 + 0.25 * torch.rand(256, 192).bfloat16()
    p = nn.Parameter(start.clone())
    # sign(R) P' of a rank-one gradient is known: every weight moves by the same.
    optimizer = GaLoreAdamW(
        [p], lr=share * SPACING, betas=(0.0, 0.0), eps=0.0, rank=rank, scale=192**0.5, weight_rounding=weight_rounding
    )
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    value = p.detach().float()
    if weight_rounding == "compensated":
        value = join_24_bits(p.detach(), optimizer.state[p]["weight_correction"])
    return float((value - start.float()).mean()) / (-share * SPACING * steps)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("share", [*nightly(0.3, 0.03), 0.003, *nightly(0.0003)])
@pytest.mark.parametrize("weight_rounding", ["stochastic", "compensated"])
def test_small_updates_accumulate(weight_rounding: str, share: float, rank: int | None) -> None:
    # Stochastically rounded, share * steps * 49152 weights jump: a standard deviation of 0.6 % at the two smallest.
    steps = 200 if share >= 0.003 or weight_rounding == "compensated" else 2000
    assert drift(weight_rounding, share, rank=rank, steps=steps) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rank", [None, 1])
def test_rounding_to_nearest_loses_them(rank: int | None) -> None:
    assert drift("nearest", 0.3, rank=rank) == 0.0


def test_the_compensated_weight_is_the_nearest_bfloat16_of_an_fp32_run() -> None:
    exact = nn.Parameter(torch.randn(40, 30).bfloat16().float())
    pair = nn.Parameter(exact.detach().bfloat16())
    kwargs = {"lr": 1e-3, "weight_decay": 0.1, "rank": None}
    ours = GaLoreAdamW([pair], weight_rounding="compensated", **kwargs)
    theirs = GaLoreAdamW([exact], **kwargs)
    for _ in range(100):
        grad = torch.randn(40, 30).bfloat16()
        pair.grad, exact.grad = grad, grad.float()
        ours.step()
        theirs.step()
    joined = join_24_bits(pair.detach(), ours.state[pair]["weight_correction"])
    # A random walk of 100 roundings of 2^-15 at most, seen at 1200 weights.
    torch.testing.assert_close(joined, exact.detach(), rtol=20 * 2.0**-15, atol=1e-6)
    # Nearest, but for weights in the middle between two, of which the 8 random bits decide.
    assert float((pair.detach() != joined.bfloat16()).float().mean()) < 1 / 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("weight_rounding", ["stochastic", "compensated"])
def test_wider_weights_are_written_as_without_the_option(dtype: torch.dtype, weight_rounding: str) -> None:
    p, q = (nn.Parameter(torch.ones(8, 6, dtype=dtype)) for _ in range(2))
    plain, rounding = GaLoreAdamW([p], rank=2), GaLoreAdamW([q], rank=2, weight_rounding=weight_rounding)
    grad = torch.randn(8, 6, dtype=dtype)
    p.grad, q.grad = grad, grad.clone()
    plain.step()
    rounding.step()
    assert torch.equal(p, q) and "weight_correction" not in rounding.state[q]


@pytest.mark.parametrize("weight_rounding", ["stochastic", "compensated"])
def test_float16_weights_are_refused(weight_rounding: str) -> None:
    p = nn.Parameter(torch.ones(8, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match=f"Invalid weight_rounding: '{weight_rounding}' for a float16 parameter"):
        GaLoreAdamW([p], weight_rounding=weight_rounding)


@pytest.mark.parametrize("weight_rounding", ["nearest", "stochastic", "compensated"])
def test_weights_that_are_not_contiguous(weight_rounding: str) -> None:
    value = torch.randn(12, 9).bfloat16()
    p, q = nn.Parameter(value.clone()), nn.Parameter(value.T.contiguous().T)
    grad = torch.randn(12, 9).bfloat16()
    for w in (p, q):
        optimizer = GaLoreAdamW([w], lr=0.1, rank=3, weight_rounding=weight_rounding)
        w.grad = grad
        optimizer.step()
    # The products of the two layouts may be summed in another order, and a value near a bound be rounded the other way;
    # with other random bits two values of five would be.
    torch.testing.assert_close(p, q, rtol=2.0**-7, atol=0)
    assert float((p != q).float().mean()) < 0.05 and not torch.equal(p, value)


def test_compensation_can_be_switched_on_and_off_in_a_run() -> None:
    p = nn.Parameter(torch.ones(8, 6).bfloat16())
    optimizer = GaLoreAdamW([p], rank=2)
    for mode in ("nearest", "compensated", "stochastic", "compensated"):
        optimizer.param_groups[0]["weight_rounding"] = mode
        p.grad = torch.randn(8, 6).bfloat16()
        optimizer.step()
        assert bool(p.isfinite().all())
    assert "weight_correction" in optimizer.state[p]


def test_an_unknown_rounding_is_named() -> None:
    with pytest.raises(ValueError, match="Invalid weight_rounding: 'up', expected one of 'nearest', 'stochastic'"):
        GaLoreAdamW([nn.Parameter(torch.zeros(8, 6))], weight_rounding="up")
