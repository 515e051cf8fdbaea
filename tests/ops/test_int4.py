from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.int4 import dequantize_int4, group_count, packed_shape, quantize_int4_


def round_trip(values: torch.Tensor, group_size: int = 256) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rows, columns = values.shape
    groups = group_count(rows, columns, group_size)
    codes = torch.full(packed_shape(rows, columns), 0xAB, dtype=torch.uint8)
    scale, zero = torch.full((groups,), torch.nan), torch.full((groups,), 77, dtype=torch.uint8)
    quantize_int4_(codes, scale, zero, values, group_size=group_size)
    return dequantize_int4(codes, scale, zero, columns, group_size=group_size), [codes, scale, zero]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (40, 128), (33, 7), (512, 129)], ids=str)
@pytest.mark.parametrize("group_size", [1, 7, 256])
def test_values_come_back_within_half_a_step(shape: tuple[int, int], group_size: int) -> None:
    values = torch.randn(shape)
    restored, (_, scale, _) = round_trip(values, group_size)
    steps = scale.repeat_interleave(group_size)[: values.numel()].view(shape)
    assert bool(((restored - values).abs() <= 0.51 * steps).all())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e20])
def test_groups_of_one_sign_and_zeros_survive(magnitude: float) -> None:
    """The published zero point is cut off: [1.0, 1.1] comes back as 0.1."""
    for group in (torch.linspace(1.0, 1.1, 256), torch.linspace(-1.1, -1.0, 256), torch.zeros(256)):
        restored, _ = round_trip(magnitude * group.view(16, 16))
        torch.testing.assert_close(restored / magnitude, group.view(16, 16), rtol=0, atol=1.1 / 30)
    assert torch.equal(round_trip(torch.zeros(4, 4))[0], torch.zeros(4, 4))


def test_half_a_byte_a_value() -> None:
    _, (codes, scale, zero) = round_trip(torch.randn(512, 128))
    assert codes.numel() * codes.element_size() == 512 * 128 // 2
    assert scale.numel() == zero.numel() == 512 * 128 // 256


@pytest.mark.parametrize("group_size", [7, 256])
def test_rounding_at_most_doubles_a_value_and_keeps_its_sign(group_size: int) -> None:
    """So that no column of a basis, whose entries are at most 1, becomes longer than 2, whatever its neighbours are."""
    values = (torch.rand(64, 96) * 2 - 1) * 10 ** (-50 * torch.rand(64, 96).square())
    values[:8] *= 1e-38
    values[8:16] = 0
    values[16:24].abs_()
    restored, (_, scale, _) = round_trip(values, group_size)
    assert bool(scale.isfinite().all()) and bool(restored.isfinite().all())
    assert bool((restored.abs() <= 2.001 * values.abs()).all()) and bool((restored * values >= 0).all())
