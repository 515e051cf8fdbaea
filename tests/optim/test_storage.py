"""How parameters are seen and stored, asked directly."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim.ops.rounding import join_24_bits
from lowrank_optim.optim import state_storage, weight_storage
from lowrank_optim.optim.parts import Slot, Update
from lowrank_optim.optim.state_storage import SALTS, load_moment, moment_slots, replace_moment_, slices, store_moment_
from lowrank_optim.optim.views import as_matrices, seed_of, view_of
from lowrank_optim.optim.weight_storage import check_storable, is_quantized, value_of, weight_slots, writable, write_


@pytest.mark.parametrize(
    ("shape", "role", "rank", "kind", "batch"),
    [
        ((), None, 4, "vector", ()),
        ((7,), None, 4, "vector", ()),
        ((7, 5), None, 4, "matrix", ()),
        ((7, 5), "experts", 4, "matrix", ()),
        ((3, 7, 5), None, 4, "stack", (3,)),
        ((3, 7, 5), None, 5, "convolution", ()),
        ((3, 7, 5), None, None, "stack", (3,)),
        ((3, 7, 5), "experts", 5, "stack", (3,)),
        ((3, 7, 5), "convolution", 4, "convolution", ()),
        ((2, 3, 7, 5), None, 4, "convolution", ()),
        ((2, 3, 7, 5), "experts", 4, "stack", (2, 3)),
    ],
)
def test_views(shape: tuple[int, ...], role: str | None, rank: int | None, kind: str, batch: tuple[int, ...]) -> None:
    view = view_of(torch.empty(shape, dtype=torch.bfloat16), role, rank)
    assert (view.kind, view.batch, view.shape, view.wide) == (kind, batch, shape, torch.float32)
    seen = view.as_matrix()
    if kind == "convolution":
        assert seen.shape == (shape[0], torch.Size(shape[1:]).numel()) and seen.batch == ()
    else:
        assert seen == view
    tensor = torch.empty(shape)
    found = as_matrices(tensor, seen)
    assert found.shape == seen.shape and found.data_ptr() == tensor.data_ptr()
    assert (found is tensor) is (kind != "convolution")


def test_seeds_come_from_names() -> None:
    assert seed_of(None, 7) == 7 and seed_of("a", 7) == seed_of("a", 8) != seed_of("b", 7)


def test_no_two_uses_of_random_bits_share_a_number() -> None:
    assert len(set(SALTS.values())) == len(SALTS)
    # The micro-batches of a sum count on from there.
    assert SALTS["sum"] == max(SALTS.values()) > 0


def test_wide_dtypes() -> None:
    for dtype in (torch.float64, torch.complex64, torch.complex128):
        assert view_of(torch.empty(3, dtype=dtype), None, None).wide == dtype


ENOUGH = state_storage.MIN_8BIT_SIZE


@pytest.mark.parametrize(
    ("numel", "dtype", "state_dtype", "stored"),
    [
        (ENOUGH, torch.float32, "float32", torch.float32),
        (ENOUGH, torch.float32, "bfloat16", torch.bfloat16),
        (8, torch.float32, "bfloat16", torch.bfloat16),
        (ENOUGH, torch.float64, "bfloat16", torch.bfloat16),
        (ENOUGH, torch.complex64, "bfloat16", torch.complex64),
        (ENOUGH, torch.complex64, "int8", torch.complex64),
        (ENOUGH - 1, torch.float32, "int8", torch.float32),
        (ENOUGH, torch.float32, "int8", torch.uint8),
        (ENOUGH + 1, torch.float64, "int8", torch.uint8),
    ],
)
def test_how_a_moment_is_stored(numel: int, dtype: torch.dtype, state_dtype: str, stored: torch.dtype) -> None:
    slots = moment_slots("exp_avg", (numel,), dtype, state_dtype, "rows")
    if stored == torch.uint8:
        scales = Slot((-(-numel // 256),), torch.float32)
        assert slots == {"exp_avg.codes": Slot((numel,), torch.uint8, "rows"), "exp_avg.scale": scales}
    else:
        assert slots == {"exp_avg": Slot((numel,), stored, "rows")}
    state: dict[str, Any] = {"seed": 1, "step": 1}
    state |= {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in slots.items() if isinstance(slot, Slot)}
    for grad_dtype in (torch.bfloat16, torch.float64):
        moment = load_moment(state, "exp_avg", grad_dtype)
        if stored == dtype:
            assert moment is state["exp_avg"]
        else:
            assert moment.dtype == (torch.float64 if grad_dtype == torch.float64 else torch.float32)
    store_moment_(state, "exp_avg", torch.ones(numel, dtype=dtype))
    assert load_moment(state, "exp_avg", torch.float32).eq(1).all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_moment_is_replaced_unless_the_gradient_was_not_finite(stored: torch.dtype) -> None:
    for ok, kept in [(True, False), (torch.tensor(1.5), False), (torch.tensor(torch.nan), True)]:
        state: dict[str, Any] = {"seed": 1, "step": 1, "error": torch.ones(4, dtype=stored)}
        replace_moment_(state, "error", torch.full((4,), 3.0 if not kept else torch.nan), ok)
        assert state["error"].tolist() == ([1.0] * 4 if kept else [3.0] * 4)


def test_slices_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_storage, "SLICE", 512)
    tensor, other = torch.arange(1300.0), torch.arange(1300.0).view(2, 650)
    state = {
        "step": 3, "exp_avg": torch.arange(1300.0), "half": torch.zeros(650),
        "exp_avg_sq.codes": torch.zeros(1300, dtype=torch.uint8), "exp_avg_sq.scale": torch.arange(6.0),
        "error.nibbles": torch.zeros(2, 325, dtype=torch.uint8), "error.nibble_scale": torch.arange(11.0),
        "odd": torch.arange(2600.0)[::2],
    }  # fmt: skip
    parts = list(slices(state, tensor, tensor + 1))
    assert [part["start"] for part, _ in parts] == [0, 512, 1024]
    assert [len(some) for _, (some, _) in parts] == [512, 512, 276]
    for part, (some, _) in parts:
        assert torch.equal(part["exp_avg"], some) and len(part["exp_avg_sq.codes"]) == len(some)
        assert part["half"] is state["half"] and part["step"] == 3 and part["odd"] is state["odd"]
    assert [part["error.nibbles"].numel() for part, _ in parts] == [256, 256, 138]
    assert [part["error.nibble_scale"].tolist() for part, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [part["exp_avg_sq.scale"].tolist() for part, _ in parts] == [[0, 1], [2, 3], [4, 5]]
    # All at once: shapes that differ, strides, and few values.
    for tensors in [(tensor, other), (tensor, torch.arange(2600.0)[::2]), (tensor[:512], tensor[:512])]:
        (only,) = slices(state, *tensors)
        assert only[0] is state and all(a is b for a, b in zip(only[1], tensors))


def int8_param() -> tuple[nn.Parameter, Any]:
    holder = SimpleNamespace(parts=lambda: (torch.full((2, 3), 127, dtype=torch.int8), torch.ones(2, 1)))
    p = nn.Parameter(torch.empty(1).expand(2, 3), requires_grad=False)
    p.quantized_reference = holder  # type: ignore[attr-defined]
    return p, holder


def test_what_is_kept_beside_a_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = torch.empty(2, 3, dtype=dtype)
        for rounding in ("nearest", "stochastic", "compensated"):
            expected = dtype == torch.bfloat16 and rounding == "compensated"
            assert ("weight_correction" in weight_slots(p, rounding)) is expected
            if dtype == torch.float16 and rounding != "nearest":
                with pytest.raises(ValueError, match=r"Invalid weight_rounding: .*float16 parameter"):
                    check_storable(p, rounding)
            else:
                check_storable(p, rounding)
    param, _ = int8_param()
    bf16 = torch.empty(2, 3, dtype=torch.bfloat16)
    bf16.quantized_reference = None  # type: ignore[attr-defined]
    assert is_quantized(param) and not weight_slots(bf16, "compensated")
    assert value_of(param).tolist() == [[127.0] * 3] * 2
    plain = torch.ones(2)
    assert value_of(plain) is plain and not is_quantized(plain)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_to(rounding: str, dtype: torch.dtype) -> None:
    p = torch.ones(4, 64, dtype=dtype)
    state = {"seed": 1, "step": 1, "weight_correction": torch.zeros(4, 64, dtype=torch.int8)}
    # A quarter of the distance to the next number of bf16.
    step = 2.0**-9
    with writable(p, state, rounding) as value:
        copies = dtype == torch.bfloat16 and rounding != "nearest"
        assert (value is p) is not copies and value.dtype == (torch.float32 if copies else dtype)
        value.add_(step)
    if dtype == torch.float32:
        assert p.eq(1 + step).all()
    elif rounding == "nearest":
        assert p.eq(1).all()
    elif rounding == "compensated":
        assert state["weight_correction"].ne(0).any()
        with writable(p, state, rounding) as value:
            assert value.sub(1 + step).abs().max() < 2.0**-14
    else:
        assert set(p.unique().tolist()) == {1.0, 1 + 2.0**-7} and state["weight_correction"].eq(0).all()


def written(dtype: torch.dtype, rounding: str, backend: str | None, **changes: Any) -> tuple[torch.Tensor, Any]:
    """A weight of ones after ``write_``, and its state; changes are of the update and of the numbers."""
    p = torch.ones(6, 5, dtype=dtype)
    state = {"seed": 1, "step": 1, "left": False, "weight_correction": torch.zeros(6, 5, dtype=torch.int8)}
    numbers = {"size": -(2.0**-11), "decay": 1.0, **changes}
    update = Update(torch.ones(6, 2), **({"row_scale": torch.ones(6, 1)} if numbers.pop("scales", False) else {}))
    basis = torch.ones(5, 2, dtype=dtype)
    group = {"weight_rounding": rounding, "backend": backend}
    view = view_of(p, None, 2)
    write_(p, view, update, torch.ones(6, 5, dtype=dtype), basis, state, group, decay_first=True, **numbers)
    return p, state


@pytest.mark.parametrize(
    ("dtype", "rounding", "backend", "changes", "asks"),
    [
        # cuBLAS is faster, or nothing else is there.
        (torch.bfloat16, "nearest", None, {}, False),
        (torch.float32, "nearest", None, {"scales": True}, False),
        (torch.float64, "nearest", "triton", {"scales": True}, False),
        (torch.bfloat16, "nearest", "triton", {}, True),
        (torch.bfloat16, "stochastic", None, {}, True),
        (torch.bfloat16, "compensated", None, {}, True),
        (torch.bfloat16, "nearest", None, {"scales": True}, True),
        (torch.bfloat16, "nearest", None, {"size": torch.tensor(-0.5)}, True),
        (torch.bfloat16, "nearest", None, {"decay": torch.tensor(0.5)}, True),
    ],
    ids=str,
)
def test_which_updates_ask_for_a_kernel(
    dtype: torch.dtype, rounding: str, backend: str | None, changes: dict[str, Any], asks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []
    monkeypatch.setattr(weight_storage, "pick", lambda eager, backend, device: (asked.append(backend), eager)[1])
    written(dtype, rounding, backend, **changes)
    assert asked == ([backend] if asks else [])


def test_a_compressed_weight_keeps_what_rounding_cuts_off() -> None:
    # A quarter of the distance to the next number of bf16 below 1.
    p, state = written(torch.bfloat16, "compensated", None)
    assert join_24_bits(p, state["weight_correction"]).sub(1 - 2.0**-10).abs().max() < 2.0**-15
    p, state = written(torch.bfloat16, "stochastic", None)
    assert set(p.unique().tolist()) == {1.0, 1 - 2.0**-8} and state["weight_correction"].eq(0).all()


@pytest.mark.parametrize("per_matrix", ["size", "decay", "both"])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str)
def test_matrices_with_step_sizes_of_their_own(dtype: torch.dtype, atol: float, scale: Any, per_matrix: str) -> None:
    torch.manual_seed(1)
    weight, low, basis, grad = (torch.randn(2, *shape) for shape in [(6, 5), (6, 2), (5, 2), (6, 5)])
    update = Update(low, scale, torch.rand(2, 6, 1), torch.rand(2, 1, 5))
    sizes, decays = torch.tensor([-0.5, -0.25]).view(2, 1, 1), torch.tensor([0.5, 0.75]).view(2, 1, 1)
    size, decay = sizes if per_matrix != "decay" else -0.5, decays if per_matrix != "size" else torch.tensor(0.5)
    group = {"weight_rounding": "compensated", "backend": None}
    p = weight.to(dtype, copy=True)
    state: dict[str, Any] = {"seed": 1, "step": 1, "left": False}
    if dtype == torch.bfloat16:
        state["weight_correction"] = torch.zeros(2, 6, 5, dtype=torch.int8)
    view = view_of(p, "experts", 2)
    write_(p, view, update, grad, basis, state, group, size=size, decay=decay, decay_first=True)
    found = p
    if dtype == torch.bfloat16:
        found = join_24_bits(p, state["weight_correction"])
        assert state["weight_correction"].ne(0).any((-2, -1)).all()
    for i in range(2):
        one, kept = (float(x[i]) if isinstance(x, torch.Tensor) and x.ndim else float(x) for x in (size, decay))
        slope = update.row_scale[i] * grad[i] * update.column_scale[i]  # type: ignore[index]
        expected = kept * weight[i].to(dtype).float() + one * (0.5 * low[i] @ basis[i].mT + slope)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("decay_first", [False, True])
def test_a_weight_moves_by_the_update_of_its_oriented_view(
    decay_first: bool, left: bool, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    def draw(*shape: int, kind: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*batch, *shape, dtype=kind)

    weight, grad, low, basis = (draw(*shape, kind=dtype) for shape in [(6, 5), (6, 5), (6, 2), (5, 2)])
    full = draw(6, 5, kind=dtype)
    kept = {"size": -0.5, "decay": 0.75, "decay_first": decay_first}
    for changes in (
        {"low": low, "scale": 0.3},
        *({"row_scale": draw(rows, 1)} for rows in (6, 1)),
        {"column_scale": draw(1, 5)},
        *({"low": low, "row_scale": draw(rows, 1), "column_scale": draw(1, 5)} for rows in (6, 1)),
        {"full": full},
    ):
        update = Update(**changes)
        move = torch.zeros_like(weight) if update.full is None else full
        if update.low is not None:
            move = move + update.scale * low @ basis.mH
        if update.row_scale is not None or update.column_scale is not None:
            scales = [scale for scale in (update.row_scale, update.column_scale) if scale is not None]
            move = move + math.prod(scales, start=grad)
        expected = 0.75 * (weight - 0.5 * move) if not decay_first else 0.75 * weight - 0.5 * move
        p = (weight.mT if left else weight).contiguous().clone()
        state, group = {"seed": 1, "step": 1, "left": left}, {"weight_rounding": "nearest", "backend": None}
        view = view_of(p, "experts" if batch else None, 2)
        write_(p, view, update, grad, None if update.low is None else basis, state, group, **kept)  # type: ignore[arg-type]
        torch.testing.assert_close(p.mT if left else p, expected, rtol=1e-12, atol=1e-12)
