"""The kernel against the eager operation: the same bits where the arithmetic leaves no choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction as eager
from lowrank_optim.ops.blockwise import BLOCK, dequantize, quantize_, search_tables

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
twin = pytest.importorskip("lowrank_kernels.adam8bit_direction")
SHAPES = [(1, 1), (61, 37), (4, 256), (3, 400), (0, 4)]


def state(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    n = shape[0] * shape[1]
    codes = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(-(-n // BLOCK), device=device) for _ in range(2)]
    return [codes[0], scales[0], codes[1], scales[1]]


@triton.jit
def quantize_kernel(
    values_ptr, codes_ptr, scale_ptr, bounds_ptr, BLOCK: tl.constexpr, DECADES: tl.constexpr,
    LEAST_SCALE: tl.constexpr, GREATEST_SCALE: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + at)
    code, scale = twin.quantize(values, bounds_ptr, DECADES, LEAST_SCALE, GREATEST_SCALE, SIGNED)
    tl.store(codes_ptr + at, code)
    tl.store(scale_ptr + tl.program_id(0), scale)


def compare(values: Tensor, signed: bool) -> None:
    """The kernel's codes and scales of whole blocks against the eager ones; of a block with a NaN all are NaN."""
    codes, expected = (torch.full(values.shape, 7, dtype=torch.uint8, device=values.device) for _ in range(2))
    scale, largest = (torch.empty(len(values), device=values.device) for _ in range(2))
    bounds = search_tables(values.device)[signed][1]
    quantize_kernel[(len(values),)](values, codes, scale, bounds, SIGNED=signed, **twin.LAUNCH)
    quantize_(expected, largest, values, signed=signed)
    torch.testing.assert_close(scale, largest, rtol=0, atol=0, equal_nan=True)
    finite = ~largest.isnan()
    assert torch.equal(finite, ~values.isnan().any(1)) and torch.equal(codes[finite], expected[finite])


def beside_ones(values: Tensor) -> Tensor:
    """Values in blocks that begin with a one, so that each is its own share of the scale."""
    values = torch.cat((values, values.new_zeros(-len(values) % (BLOCK - 1)))).view(-1, BLOCK - 1)
    return torch.cat((torch.ones_like(values[:, :1]), values), dim=1)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_bound_and_its_neighbours_get_the_nearest_code(signed: bool, device: torch.device) -> None:
    """On the last value of a code, on the first of the next one, on codes and decades; far out; none, and no number."""
    codes, bounds, _ = search_tables(device)[signed]
    decades = 10.0 ** -torch.arange(9.0, device=device)
    values = torch.cat((codes, bounds[:-1], decades, -decades if signed else decades))
    ends = [torch.nextafter(values, torch.full_like(values, end)) for end in (-9.0, 9.0)]
    values = torch.cat((values, *ends)).clamp(-1 if signed else 0, 1)
    extremes = torch.tensor([[torch.nan], [torch.inf], [3e38], [0.0], [1e-45], [1e-39]], device=device)
    extremes = extremes.expand(-1, BLOCK).clone()
    extremes[:, 1::3] *= 0.3
    if signed:
        extremes[:, 2::3] *= -1
    compare(torch.cat((beside_ones(values), extremes)), signed)


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_bfloat16_gets_the_eager_code(signed: bool, device: torch.device) -> None:
    """Each as a share of a scale of one, and in blocks of neighbours of any magnitude, NaN and infinity too."""
    every = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16).float()
    every = every if signed else every[: 2**15]
    compare(torch.cat((beside_ones(every[every.abs() <= 1]), every.view(-1, BLOCK))), signed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_the_same_bits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """With betas of 0 the moments are R and R², of every magnitude and in the middle between two codes."""
    grad = (torch.randn(shape, device=device) * 10.0 ** torch.randint(-9, 3, shape, device=device)).to(dtype)
    grad[:, ::3] = 0
    ours, theirs = state(shape, device), state(shape, device)
    kwargs = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8}
    direction = pick(eager, "triton", device)(grad, *ours, **kwargs)
    torch.testing.assert_close(direction, eager(grad, *theirs, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_positive_second_moment_never_becomes_zero(device: torch.device) -> None:
    """Gradients whose squares are far below their block's largest, without a normal number, or above fp32's range."""
    grad = (torch.rand(8, BLOCK, device=device) + 0.5) * 10.0 ** torch.randint(-22, -2, (8, BLOCK), device=device)
    grad[:4, 0] = torch.tensor([1e-20, 1.0, 1e18, 1e20], device=device)
    grad[4:] *= 1e-3
    grad[:, 1::5] = 0
    ours, theirs = state((8, BLOCK), device), state((8, BLOCK), device)
    kwargs = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8}
    pick(eager, "triton", device)(grad, *ours, **kwargs)
    eager(grad, *theirs, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    positive = grad * grad > 0
    assert torch.equal(ours[2] > 0, positive) and torch.equal(dequantize(*ours[2:], signed=False) > 0, positive)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_stays_within_a_code(on_device: bool, device: torch.device) -> None:
    shape = (61, 37)
    ours, theirs = state(shape, device), state(shape, device)
    eps = torch.tensor(1e-8, device=device) if on_device else 1e-8
    norms, expected = torch.empty(2, 61, device=device), torch.empty(2, 61, device=device)
    for _ in range(3):
        grad = torch.randn(shape, device=device).T.contiguous().T
        kwargs = {"beta1": 0.9, "beta2": 0.999, "eps": eps}
        direction = pick(eager, "triton", device)(grad, *ours, **kwargs, norms=norms)
        other = eager(grad, *theirs, **kwargs, norms=expected)
        # Moments that differ in the last bit may fall to two sides of a bound.
        assert float((ours[0] != theirs[0]).float().mean()) < 1e-2
        a, b = (dequantize(*moments[:2], signed=True) for moments in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0.2, atol=1e-3)
        torch.testing.assert_close(norms, torch.stack([grad.norm(dim=1), direction.norm(dim=1)]))
        torch.testing.assert_close(norms[0], expected[0])
        assert float((direction - other).norm() / other.norm()) < 1e-2
