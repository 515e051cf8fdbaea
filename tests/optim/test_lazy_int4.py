"""The 4-bit basis of Q-GaLore, complex ones included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_optim.optim.parts import View, Which
from lowrank_optim.optim.qgalore import LazyInt4, QGaLoreAdamW8bit
from lowrank_optim.optim.schema import allocate_

DTYPES = [torch.float32, torch.complex64, torch.complex128, torch.bfloat16]


def made(dtype: torch.dtype, **options: Any) -> tuple[LazyInt4, dict[str, Any], dict[str, Any]]:
    p = torch.nn.Parameter(torch.zeros(10, 8, dtype=dtype))
    group = QGaLoreAdamW8bit([p], rank=3, **options).param_groups[0]
    subspace, state = LazyInt4(), {"seed": 1, "step": 1}
    view = View((10, 8), dtype, p.device, "matrix")
    allocate_(state, subspace.slots(view, group), p.device)
    return subspace, state, group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_group_size", [256, 7])
def test_a_basis_comes_back_to_within_half_a_step(dtype: torch.dtype, quant_group_size: int) -> None:
    subspace, state, group = made(dtype, quant_group_size=quant_group_size)
    wide = torch.promote_types(dtype, torch.float32)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=wide)).Q
    # A view that is to be conjugated has the other's bits.
    for given in (basis, basis.conj() if dtype.is_complex else -basis):
        subspace.keep_basis_(given, state, group)
        found = subspace.basis(torch.empty(0, dtype=dtype), state, group)
        assert found.shape == (8, 3) and found.dtype == dtype
        # 15 steps between -1 and 1.
        assert float((found.to(wide) - given).abs().max()) < 2 / 15


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_gap_follows_the_share_of_the_old_subspace(dtype: torch.dtype) -> None:
    subspace, state, group = made(dtype, update_proj_gap=4, queue_size=2, cos_threshold=0.4, gamma_proj=1.5)
    one, other = torch.eye(8, dtype=dtype)[:, :3], torch.eye(8, dtype=dtype)[:, 3:6]
    if dtype.is_complex:
        # Orthogonal only where one of the two is conjugated.
        one = (one + 1j * other) / 2**0.5
        other = one.conj()
    subspace.replace_basis_(one, state, group, Which(warm=False))
    # The first basis has no predecessor.
    assert state["overlaps"].isnan().all() and state["gap"] == 4
    overlaps, gaps = [], []
    for basis in (one, one, other, other, other):
        subspace.replace_basis_(basis, state, group, Which())
        overlaps.append(float(state["overlaps"][-1]))
        gaps.append(state["gap"])
    assert overlaps == pytest.approx([1, 1, 0, 1, 1], abs=0.05) and gaps == [4, 6, 9, 13, 19]
