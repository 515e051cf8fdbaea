"""Positions of a sparse matrix: drawn uniformly, packed as small as possible, unpacked without loss."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops.support import draw_positions, empty_support, pack_, positions

# (rows, columns), count, the packing that is smallest, its bytes.
CASES = [
    ((5, 5461), 819, "columns", 2 * 819 + 4 * 6),
    ((5461, 16), 2621, "flat", 4 * 2621),
    ((64, 64), 1228, "bitmap", 64 * 64 // 8),
    ((9, 13), 105, "bitmap", 15),
    ((7, 65536), 13762, "columns", 2 * 13762 + 4 * 8),
    ((7, 65537), 9000, "flat", 4 * 9000),
    ((7, 65537), 45000, "bitmap", -(-7 * 65537 // 8)),
    ((3, 3), 0, "flat", 0),
    ((1, 40), 1, "flat", 4),
    ((512, 512), 1, "flat", 4),
]


def packing_of(index: torch.Tensor, row_pointers: torch.Tensor) -> str:
    if index.dtype != torch.uint8:
        return "flat"
    return "columns" if row_pointers.numel() else "bitmap"


@pytest.mark.parametrize(("shape", "count", "packing", "size"), CASES)
def test_positions_survive_the_smallest_packing(shape: tuple[int, int], count: int, packing: str, size: int) -> None:
    flat = draw_positions(shape, count, torch.Generator().manual_seed(1))
    index, row_pointers = empty_support(shape, count, None)
    assert packing_of(index, row_pointers) == packing
    assert index.nbytes + row_pointers.nbytes == size
    pack_(index, row_pointers, flat, shape)
    found = positions(index, row_pointers, shape, count)
    assert found.dtype == torch.int32
    assert found.tolist() == flat.tolist()


def test_first_and_last_entries_and_full_and_empty_rows_survive() -> None:
    shape = (6, 300)
    flat = torch.cat([torch.arange(300), torch.tensor([900, 1199, 1799])])
    for count_of_packing in (flat, flat[-3:]):
        index, row_pointers = empty_support(shape, len(count_of_packing), None)
        pack_(index, row_pointers, count_of_packing, shape)
        assert positions(index, row_pointers, shape, len(count_of_packing)).tolist() == count_of_packing.tolist()


@pytest.mark.parametrize(
    ("shape", "sparsity", "packing", "dtype"),
    [
        ((11008, 4096), 0.05, "columns", torch.uint8),
        ((40000, 60000), 0.03, "columns", torch.uint8),
        ((32767, 65538), 0.01, "flat", torch.int32),
        ((32768, 65537), 0.01, "flat", torch.int64),
        ((32768, 65537), 0.03, "bitmap", torch.uint8),
    ],
)
def test_int64_is_kept_for_matrices_of_two_to_the_31_entries(
    shape: tuple[int, int], sparsity: float, packing: str, dtype: torch.dtype
) -> None:
    index, row_pointers = empty_support(shape, int(sparsity * shape[0] * shape[1]), "meta")
    assert (packing_of(index, row_pointers), index.dtype) == (packing, dtype)
    assert row_pointers.dtype == torch.int32


def test_positions_beyond_int32_are_int64() -> None:
    # Sparse enough to fit into memory: 40 entries of a 40000 x 60000 matrix, packed by hand as columns.
    shape = (40000, 60000)
    flat = draw_positions(shape, 40, torch.Generator().manual_seed(0))
    index, row_pointers = torch.empty(80, dtype=torch.uint8), torch.empty(40001, dtype=torch.int32)
    pack_(index, row_pointers, flat, shape)
    found = positions(index, row_pointers, shape, 40)
    assert found.dtype == torch.int64
    assert found.max() > 2**31
    assert torch.equal(found, flat)


@pytest.mark.parametrize(("shape", "count"), [((512, 512), 7864), ((30, 50), 1499), ((20, 20), 200), ((4, 4), 0)])
def test_draws_are_sorted_distinct_and_repeatable(shape: tuple[int, int], count: int) -> None:
    draw = [draw_positions(shape, count, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert count == 0 or not torch.equal(draw[0], draw[2])
    assert len(draw[0]) == count
    assert bool((draw[0].diff() > 0).all())
    assert count == 0 or (draw[0][0] >= 0 and draw[0][-1] < shape[0] * shape[1])


@pytest.mark.parametrize("count", [3, 20, 37])
def test_every_position_is_equally_likely(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = 4000
    hits = torch.zeros(40)
    for _ in range(rounds):
        hits[draw_positions((5, 8), count, generator)] += 1
    p = count / 40
    # 40 counts with a binomial deviation: five of them is a one-in-40,000 event.
    assert float((hits - rounds * p).abs().max()) < 5 * (rounds * p * (1 - p)) ** 0.5
