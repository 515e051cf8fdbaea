"""Subspaces on their own: what a refresh says of the bases before and after it, and what it cannot use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.optim.parts import Subspace, View, Which
from lowrank_optim.optim.schema import allocate_
from lowrank_optim.optim.subspaces import singular, tracking
from lowrank_optim.optim.subspaces.random import (
    Gaussian,
    RandomColumns,
    RandomOrthonormal,
    noise,
    overlap_of,
    pick_columns,
    predecessors,
    sketch_matrix,
)
from lowrank_optim.optim.subspaces.singular import TopSingular
from lowrank_optim.optim.subspaces.tracking import Tracking
from lowrank_optim.optim.subspaces.tucker import Tucker

COLD, WARM = Which(warm=False), Which()
OPTIONS = {
    "rank": 3, "proj_type": "std", "moments": "keep", "capturable": False, "backend": None, "refresh": "power",
    "selection": "top", "proj_method": "power_iteration", "rho": 0.9, "betas": (0.9, 0.99), "error_feedback": True,
}  # fmt: skip


def made(
    subspace: Subspace, shape: tuple[int, ...] = (9, 8), kind: str = "matrix", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    state: dict[str, Any] = {"seed": 1, "step": 0, "exp_avg": torch.randn(9, 3)}
    allocate_(state, subspace.slots(View(shape, dtype, torch.device("cpu"), kind), OPTIONS), torch.device("cpu"))
    return state


def basis_of(subspace: Subspace, like: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """A copy of the present basis, or of the numbers of its columns."""
    return (state["indices"] if "indices" in state else subspace.basis(like, state, group)).clone()


@pytest.mark.parametrize("moments", ["keep", "align", "rotate"])
@pytest.mark.parametrize("subspace", [Gaussian(), RandomOrthonormal(), RandomColumns()], ids=lambda s: type(s).__name__)
def test_a_drawn_basis_says_how_coordinates_move_but_for_the_first(subspace: Subspace, moments: str) -> None:
    state, group, grad = made(subspace), {**OPTIONS, "moments": moments}, torch.randn(9, 8)
    first = subspace.refresh(grad, state, group, COLD)
    assert first.renewed and first.overlap is None
    old = basis_of(subspace, grad, state, group)
    second = subspace.refresh(grad, state, group, WARM)
    new = basis_of(subspace, grad, state, group)
    assert second.renewed and not torch.equal(old, new) and state["refreshes"] == 2
    if moments == "keep":
        assert second.overlap is None
    else:
        expected = overlap_of(old, new, moments) if new.is_floating_point() else predecessors(old, new, 8)
        assert second.overlap is not None and expected is not None
        torch.testing.assert_close(second.overlap, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_noise_is_real_in_the_precision_of_what_it_meets(dtype: torch.dtype) -> None:
    drawn = noise((2, 4, 3), torch.empty(0, dtype=dtype), 7, OPTIONS)
    assert drawn.shape == (2, 4, 3) and drawn.dtype == dtype.to_real() and not torch.equal(drawn[0], drawn[1])
    assert noise((4, 3), torch.empty(0, dtype=dtype), 7, OPTIONS).shape == (4, 3)


@pytest.mark.parametrize("indices", [torch.tensor([3, 0]), torch.tensor([[3, 0], [1, 2]])], ids=["one", "stack"])
@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_columns_are_picked_in_a_wide_dtype(indices: Tensor, dtype: torch.dtype, wide: torch.dtype) -> None:
    matrix = torch.randn(*indices.shape[:-1], 5, 4).to(dtype)
    picked = pick_columns(matrix, indices)
    expected = [matrix[..., i] for i in (3, 0)] if indices.ndim == 1 else None
    assert picked.dtype == wide
    if expected is None:
        expected = [torch.stack((matrix[0, :, a], matrix[1, :, b])) for a, b in ((3, 1), (0, 2))]
    assert torch.equal(picked, torch.stack(expected, -1).to(wide))


@pytest.mark.parametrize("method", ["power_iteration", "svd"])
@pytest.mark.parametrize("warm", [False, True])
def test_tracking_keeps_its_basis_where_none_can_be_computed(
    warm: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subspace, group, grad = Tracking(), {**OPTIONS, "proj_method": method}, torch.randn(9, 8)
    state = made(subspace)
    assert subspace.refresh(grad, state, group, COLD).renewed
    state["step"] = 1
    before = state["basis"].clone()
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "orthonormalize", lambda tensor, **kwargs: torch.full_like(tensor, torch.nan))
        patch.setattr(tracking, "top_basis", lambda *args, **kwargs: None)
        assert not subspace.refresh(grad, state, group, Which(warm=warm)).renewed
    assert torch.equal(state["basis"], before)
    assert subspace.refresh(torch.randn(9, 8), state, group, Which(warm=warm)).renewed
    assert not torch.equal(state["basis"], before)


def test_a_stack_whose_mean_has_no_basis_takes_that_of_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    subspace, group, grad = Tracking(), {**OPTIONS, "proj_method": "svd"}, torch.randn(2, 9, 8)
    view = View((2, 9, 8), torch.float32, torch.device("cpu"), "stack")
    state: dict[str, Any] = {"seed": 1, "step": 1, "exp_avg": torch.randn(2, 9, 3)}
    allocate_(state, subspace.slots(view, OPTIONS), torch.device("cpu"))
    assert subspace.refresh(grad, state, group, COLD).renewed
    expected = state["basis"].clone()
    monkeypatch.setattr(subspace, "_turned", lambda *_: None)
    some = Which(warm=torch.tensor([True, False]).view(2, 1, 1))
    assert subspace.refresh(grad, state, group, some).renewed
    torch.testing.assert_close(state["basis"].abs(), expected.abs())


@pytest.mark.parametrize("refresh", ["power", "randomized", "svd"])
def test_a_basis_that_cannot_be_computed_is_drawn_and_else_stays(refresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subspace, group, grad = TopSingular(), {**OPTIONS, "refresh": refresh}, torch.randn(9, 8)
    state = made(subspace)
    assert subspace.refresh(grad, state, group, COLD).renewed
    before = state["basis"].clone()

    def broken(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError  # type: ignore[attr-defined]

    def bad(grad: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.full((8, 3), torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", broken)
        patch.setattr(singular, "subspace_iteration", bad)
        with monkeypatch.context() as none:
            for found in (broken, bad):
                none.setattr(singular, "range_finder", found)
                assert not subspace.refresh(grad, state, group, WARM).renewed
                assert torch.equal(state["basis"], before)
        assert subspace.refresh(torch.randn(9, 8), state, group, WARM).renewed
    basis = state["basis"]
    assert not torch.equal(basis, before)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("subspace", [TopSingular(), Tucker(), Tracking()], ids=lambda s: type(s).__name__)
def test_in_a_stack_the_first_basis_of_one_matrix_is_no_iteration_from_nothing(subspace: Subspace) -> None:
    state = made(subspace, (2, 9, 8), "stack")
    state |= {"exp_avg": torch.randn(2, 9, 3), "step": 1}
    key = "basis.2" if isinstance(subspace, Tucker) else "basis"
    # The second matrix has had no gradient so far; from any other start an iteration would find this subspace as well.
    grad = torch.randn(2, 9, 3) @ torch.randn(2, 3, 8)
    state[key][0] = torch.linalg.qr(torch.randn(8, 3)).Q
    warm = torch.tensor([True, False]).view(2, 1, 1)
    assert subspace.refresh(grad, state, OPTIONS, Which(warm=warm)).renewed
    basis = state[key][1]
    torch.testing.assert_close(grad[1] @ basis @ basis.mT, grad[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("refresh", ["power", "randomized"])
def test_what_a_refresh_sums_beside_the_projection(refresh: str) -> None:
    subspace, group, grad = TopSingular(), {**OPTIONS, "refresh": refresh}, torch.randn(9, 8)
    state, accumulation = made(subspace), subspace.accumulation
    assert accumulation is not None
    sketch = accumulation.sketch(subspace, grad, state, group)
    if refresh == "power":
        assert sketch is None
    else:
        expected = grad @ sketch_matrix((8, 3), grad, state, group)
        torch.testing.assert_close(sketch, expected, rtol=1e-5, atol=1e-5)
    state["pending"] = torch.randn(9, 3)
    sketch = accumulation.sketch(subspace, grad, state, group)
    torch.testing.assert_close(sketch, grad.mT @ state["pending"], rtol=1e-5, atol=1e-5)


def test_axes_of_a_batch_are_not_compressed() -> None:
    subspace, shape = Tucker(), (5, 9, 2)
    # More matrices than the rank.
    state = made(subspace, shape, "stack")
    assert {key for key in state if key.startswith("basis")} == {"basis.1"} and state["basis.1"].shape == (5, 9, 3)
    assert subspace.low_shape(View(shape, torch.float32, torch.device("cpu"), "stack"), OPTIONS) == (5, 3, 2)
    state = made(subspace, shape, "convolution")
    assert {key for key in state if key.startswith("basis")} == {"basis.0", "basis.1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("subspace", [Tucker(), TopSingular(), Tracking()], ids=lambda s: type(s).__name__)
def test_a_projection_is_fp32_or_wider(subspace: Subspace, dtype: torch.dtype) -> None:
    state, grad = made(subspace, dtype=dtype), torch.randn(9, 8, dtype=torch.float64).to(dtype)
    subspace.refresh(grad, state, OPTIONS, COLD)
    low = subspace.project(grad, state, OPTIONS)
    assert low.dtype == torch.promote_types(dtype, torch.float32)
    if isinstance(subspace, Tucker):
        wide = state["basis.0"].to(low.dtype).mT @ grad.to(low.dtype) @ state["basis.1"].to(low.dtype)
    else:
        wide = grad.to(low.dtype) @ state["basis"].to(low.dtype)
    torch.testing.assert_close(low, wide, rtol=1e-5, atol=1e-5)
