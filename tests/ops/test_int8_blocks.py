from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.int8_blocks import BLOCK, blocks, dequantize, quantize_

TRUE = torch.tensor(True)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (128,), (7, 129), (40, 128), (33, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_half_a_step_of_error_and_exact_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, dtype=dtype) ** 3
    values[torch.rand(shape) < 0.3] = 0
    codes = torch.full(shape, 99, dtype=torch.int8)
    scale = torch.full((blocks(shape),), float("nan"))
    original = values.clone()
    quantize_(codes, scale, values, where=TRUE)
    assert torch.equal(values, original)
    back = dequantize(codes, scale, dtype)
    assert back.dtype == dtype and back.shape == values.shape
    by_row = scale.to(dtype).view(values[..., 0].numel(), -1)
    steps = by_row.repeat_interleave(BLOCK, -1)[:, : shape[-1]].view(shape)
    assert bool(((back - values).abs() <= 0.5 * steps * (1 + 1e-5)).all())
    assert bool((back[values == 0] == 0).all())
    assert int(codes.abs().max()) == (127 if values.any() else 0)


@pytest.mark.parametrize("length", [5, 128, 300])
def test_some_rows_are_stored_as_they_are_among_others(length: int) -> None:
    """What a process of several keeps, or a matrix of a stack."""
    values = torch.randn(2, 9, length)
    codes, scale = torch.zeros(values.shape, dtype=torch.int8), torch.zeros(blocks(values.shape))
    quantize_(codes, scale, values)
    some, its = torch.zeros(4, length, dtype=torch.int8), torch.zeros(blocks((4, length)))
    quantize_(some, its, values[1, 3:7].contiguous())
    assert torch.equal(some, codes[1, 3:7]) and torch.equal(its, scale.view(2, 9, -1)[1, 3:7].flatten())
    none = torch.zeros(0, length, dtype=torch.int8)
    quantize_(none, torch.zeros(0), torch.zeros(0, length))
    assert dequantize(none, torch.zeros(0), torch.float32).shape == (0, length)


def test_zeros_huge_and_tiny_values() -> None:
    values = torch.cat([torch.zeros(BLOCK), torch.full((BLOCK,), 3e38), torch.full((BLOCK,), -1e-30)])
    codes, scale = torch.zeros(3 * BLOCK, dtype=torch.int8), torch.zeros(3)
    quantize_(codes, scale, values, where=TRUE)
    torch.testing.assert_close(dequantize(codes, scale, torch.float32), values, rtol=1e-6, atol=0)


def test_a_false_condition_keeps_what_was_there() -> None:
    codes, scale = torch.randint(-127, 128, (300,), dtype=torch.int8), torch.rand(blocks((300,)))
    old = codes.clone(), scale.clone()
    quantize_(codes, scale, torch.full((300,), float("nan")), where=torch.tensor(False))
    assert torch.equal(codes, old[0]) and torch.equal(scale, old[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_at_most_doubles_a_value_and_makes_no_infinity(dtype: torch.dtype) -> None:
    """So that an error that is fed back cannot grow by its storage, whatever stands beside it in its block."""
    values = torch.randn(60 * BLOCK, dtype=torch.float64).view(60, BLOCK)
    values = (
        values * 10 ** (-60 * torch.rand(60, BLOCK, dtype=torch.float64)) * 10.0 ** torch.arange(-45, 15)[:, None]
    ).to(dtype)
    codes, scale = torch.zeros(60, BLOCK, dtype=torch.int8), torch.zeros(60)
    quantize_(codes, scale, values)
    back = dequantize(codes, scale, torch.float64)
    # A scale without a normal number is itself rounded.
    assert bool((back.abs() <= 2.001 * values.abs() + 127 * 2.0**-149).all()) and bool((back * values >= 0).all())
    values = torch.tensor([torch.inf, 1e300, -torch.inf, 1.0, 0.0], dtype=dtype)
    codes, scale = torch.zeros(5, dtype=torch.int8), torch.zeros(1)
    quantize_(codes, scale, values)
    back = dequantize(codes, scale, torch.float32)
    assert bool(back.isfinite().all()) and back[3:].tolist() == [0, 0] and float(back[0]) > 3e38
