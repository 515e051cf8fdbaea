from __future__ import annotations

import pytest
import torch

from lowrank_optim.ops import chunks
from tests.temporaries import CountTemporaries


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (301, 5), (2, 1), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_column_norms(
    shape: tuple[int, int], dtype: torch.dtype, order: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64)
    matrix = torch.randn(shape[::-1], dtype=dtype).mT if transposed else torch.randn(shape, dtype=dtype)
    norms = chunks.column_norms(matrix, order)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.linalg.vector_norm(matrix.to(torch.complex128), ord=order, dim=0) ** order
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


def test_parts_cover_the_rows_and_are_at_most_half() -> None:
    a, b = torch.arange(15.0).view(5, 3), torch.zeros(5, 2)
    parts = list(chunks.chunks(a, b))
    assert torch.equal(torch.cat([part for part, _ in parts]), a)
    assert [len(part) for part, _ in parts] == [len(part) for _, part in parts] == [3, 2]
    with CountTemporaries(4096) as count:
        chunks.column_norms(torch.ones(64, 64).mT, 2)
    # The ones themselves.
    assert len(count.created) <= 1
