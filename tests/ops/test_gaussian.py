from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.rounding import mix_key

CPU = torch.device("cpu")


def draw(rows: int, columns: int, seed: int = 0, index: int = 1) -> torch.Tensor:
    return gaussian(rows, columns, key=mix_key(seed, index, 5), dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("seed", range(4))
def test_moments_are_those_of_the_normal_distribution(seed: int) -> None:
    z = draw(600, 500, seed)
    n = z.numel() ** 0.5
    # Five standard deviations of each estimate.
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((z**power).mean()) - expected) < 5 * deviation / n
    assert abs(float((z < 1).double().mean()) - 0.841345) < 5 * 0.365 / n


def test_neighbours_layers_and_refreshes_are_independent() -> None:
    z = draw(512, 128)
    others = [draw(512, 128, 1, 1), draw(512, 128, 0, 2), z.roll(1, 0), z.roll(1, 1), z.view(2, -1).flip(0).view_as(z)]
    for other in others:
        for a, b in ((z, other), (z.square() - 1, other.square() - 1)):
            assert abs(float((a * b).mean() / (a.std() * b.std()))) < 5 / z.numel() ** 0.5


def test_the_spectrum_is_that_of_a_random_matrix() -> None:
    singular = torch.linalg.svdvals(draw(1024, 64)) / 1024**0.5
    assert abs(float(singular[0]) - 1.25) < 0.03 and abs(float(singular[-1]) - 0.75) < 0.03


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 2), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_shape_and_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    z = gaussian(*shape, key=-123456789, dtype=dtype, device=CPU)
    assert z.shape == shape and z.dtype == dtype and bool(z.isfinite().all())
    torch.testing.assert_close(z.double(), draw_with(-123456789, shape), rtol=1e-2, atol=1e-2)


def draw_with(key: int, shape: tuple[int, int]) -> torch.Tensor:
    return gaussian(*shape, key=torch.tensor(key, dtype=torch.int32), dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("word", [0, -1, 2**31 - 1, -(2**31)])
def test_no_hash_value_is_infinite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lowrank_optim.ops.gaussian.random_bits", lambda like, *_: torch.full(like.shape, word, dtype=torch.int32)
    )
    assert bool(gaussian(4, 4, key=0, dtype=torch.float32, device=CPU).isfinite().all())
