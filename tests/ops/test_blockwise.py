"""The 8-bit format is bitsandbytes'."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.blockwise import BLOCK, GREATEST_SCALE, LEAST_SCALE, dequantize, dynamic_map, quantize_

CPU = torch.device("cpu")
both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def quantize(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full(values.shape, 77, dtype=torch.uint8)
    scale = torch.full((-(-values.numel() // BLOCK),), torch.nan)
    quantize_(codes, scale, values, signed=signed)
    return codes, scale


def wide_range(n: int, signed: bool) -> torch.Tensor:
    values = torch.randn(n) * 10 ** (-8 * torch.rand(n))
    return values if signed else values.square()


@both
def test_the_map_and_the_values_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    code = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_map(signed, CPU), code)
    codes, scale = quantize(wide_range(10 * BLOCK + 17, signed), signed)
    theirs = functional.dequantize_blockwise(codes, absmax=scale, code=code, blocksize=BLOCK)
    assert torch.equal(dequantize(codes, scale, signed=signed), theirs)


@both
def test_the_codes_are_those_of_a_search_over_the_bounds(signed: bool) -> None:
    """Values on, just above and just below every bound: bitsandbytes' bucketize is the specification."""
    code = dynamic_map(signed, CPU)
    bounds = (code[:-1] + code[1:]) / 2
    up, down = (torch.nextafter(bounds, torch.tensor(end)) for end in (9.0, -9.0))
    values = torch.cat((bounds, up, down, code, wide_range(100 * BLOCK, signed).clamp(-1, 1)))
    values = values[values.abs() <= 1]
    # A one in every block keeps its scale at 1.
    values = values[: values.numel() // 255 * 255].view(-1, 255)
    values = torch.cat((torch.ones(len(values), 1), values), dim=1).flatten()
    codes, scale = quantize(values, signed)
    assert bool((scale == 1).all())
    nearest = torch.bucketize(values, bounds, out_int32=True)
    assert torch.equal(codes.int(), nearest if signed else nearest.maximum(values > 0))


@both
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 256), (31, 33), (0,)], ids=str)
def test_every_value_goes_to_its_nearest_code(signed: bool, shape: tuple[int, ...]) -> None:
    values = wide_range(int(torch.Size(shape).numel()), signed).reshape(shape)
    codes, scale = quantize(values, signed)
    restored = dequantize(codes, scale, signed=signed)
    assert restored.shape == values.shape
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    assert torch.equal(scale, flat.abs().amax(1))
    largest = scale.repeat_interleave(BLOCK)[: values.numel()]
    # Unsigned, zero is for zeros alone.
    code = dynamic_map(signed, CPU)[0 if signed else 1 :]
    nearest = (values.flatten() / largest).unsqueeze(1).sub(code).abs().amin(1) * largest
    nearest[values.flatten() == 0] = 0
    torch.testing.assert_close((restored - values).abs().flatten(), nearest, rtol=1e-3, atol=1e-6)


@both
def test_zeros_stay_zeros(signed: bool) -> None:
    codes, scale = quantize(torch.zeros(600), signed)
    assert torch.equal(dequantize(codes, scale, signed=signed), torch.zeros(600))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-30, 1.0, 1e30, 3e38])
def test_a_positive_second_moment_never_becomes_zero(dtype: torch.dtype, largest: float) -> None:
    """Of every magnitude below its block's largest, where the share or the scale itself has no normal number too."""
    values = largest * 10 ** (-50 * torch.rand(8 * BLOCK, dtype=torch.float64))
    values[::BLOCK] = largest
    values[1::5] = 0
    values = values.to(dtype)
    codes, scale = quantize(values, signed=False)
    restored = dequantize(codes, scale, signed=False)
    assert torch.equal(restored > 0, values > 0) and bool(restored.isfinite().all())
    assert torch.equal(codes == 0, values == 0)
    # What is raised is raised to the smallest code.
    raised = restored.double() > 2 * values.double()
    assert bool((codes[raised] == 1).all())


@both
def test_scales_stay_where_they_and_their_inverses_are_normal_numbers(signed: bool) -> None:
    extremes = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3.4e38, torch.inf])
    codes, scale = quantize(extremes.repeat_interleave(BLOCK), signed)
    least, greatest = LEAST_SCALE, GREATEST_SCALE
    assert torch.equal(scale, torch.tensor([least, least, least, 1.0, greatest, greatest]))
    restored = dequantize(codes, scale, signed=signed).view(-1, BLOCK)
    assert bool((restored[0] == 0).all()) and torch.equal(restored[3:, 0], scale[3:])


def test_an_infinity_leaves_the_rest_of_its_block_finite() -> None:
    values = torch.full((BLOCK,), 1.0)
    values[:2] = torch.tensor([torch.inf, 0.0])
    restored = dequantize(*quantize(values, signed=False), signed=False)
    assert bool(restored.isfinite().all()) and float(restored[1]) == 0 and float(restored[0]) == GREATEST_SCALE
