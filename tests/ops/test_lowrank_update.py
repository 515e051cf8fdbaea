"""The update of a weight against its formula in fp64, in place and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.ops import chunks, lowrank_update
from lowrank_optim.ops.int8_weight import dequantize_int8_weight, quantize_int8_weight_, scale_shape
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.lowrank_update_int8 import lowrank_update_int8_
from lowrank_optim.ops.rounding import join_24_bits
from tests.temporaries import CountTemporaries

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
TERMS = ["product", "rows", "one", "columns", "both", "product and rows", "product and both"]


class Products(TorchDispatchMode):
    """Within the mode, the dtype of every sum with a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "addmm" in str(func) or "baddbmm" in str(func):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def operands(terms: str, dtype: torch.dtype, batch: tuple[int, ...] = (), *, zeros: bool = False) -> dict[str, Any]:
    """Of a weight (37, 61); where a scale is zero the gradient is NaN."""
    real = torch.promote_types(dtype, torch.float32).to_real()
    found: dict[str, Any] = {"left": None, "right": None}
    if "product" in terms:
        found["left"], found["right"] = (torch.randn(*batch, n, 5, dtype=dtype) for n in (37, 61))
    rows = {"rows": 37, "both": 37, "one": 1}.get(terms.rsplit(maxsplit=1)[-1])
    if rows is not None:
        found["row_scale"] = torch.rand(*batch, rows, 1, dtype=real) + 0.1
    if terms.endswith(("columns", "both")):
        found["column_scale"] = torch.rand(*batch, 1, 61, dtype=real) + 0.1
    if terms != "product":
        found["grad"] = torch.randn(*batch, 37, 61, dtype=dtype)
        if zeros:
            for name, place in (("row_scale", (..., slice(3, 5), slice(None))), ("column_scale", (..., slice(7, 9)))):
                if name in found and terms != "one":
                    found[name][place] = 0
                    grad = found["grad"].expand(*batch, 37, 61)
                    grad.masked_fill_((found[name] == 0).expand_as(grad), float("nan"))
    return found


def formula(weight: Tensor, given: dict[str, Any], alpha: float, decay: float) -> Tensor:
    wide = {k: None if v is None else v.to(torch.complex128) for k, v in given.items()}
    value = decay * weight.to(torch.complex128)
    if wide["left"] is not None:
        value = value + alpha * wide["left"] @ wide["right"].mH
    if "grad" in wide:
        grad = torch.where(given["grad"].isnan(), 0, wide["grad"])
        value = value + wide.get("row_scale", 1) * grad * wide.get("column_scale", 1)
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice"])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_formula_rounded_once(
    terms: str, dtype: torch.dtype, layout: str, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 300)
    monkeypatch.setattr(lowrank_update, "COPIED", 300)
    for batch in ((), (3,)):
        given = operands(terms, dtype, batch, zeros=zeros)
        start = torch.randn(*batch, 37, 61, dtype=dtype)
        if layout == "transposed":
            weight = start.mT.contiguous().mT
        elif layout == "slice":
            weight = torch.full((*batch, 40, 70), float("nan"), dtype=dtype)[..., 1:38, 3:64]
            weight.copy_(start)
        else:
            weight = start.clone()
        lowrank_update_(weight, **given, alpha=-0.3, decay=0.9)
        exact = formula(start, given, -0.3, 0.9)
        # Half a unit of the last bit, and a few of fp32 for the sum.
        eps = torch.finfo(dtype).eps
        tolerance = (0.51 if eps > 1e-4 else 16) * eps
        assert bool(
            ((weight.to(torch.complex128) - exact).abs() <= tolerance * exact.abs() + 16 * min(eps, 1e-6)).all()
        )


@pytest.mark.parametrize("terms", ["rows", "product and both"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("batch", [(), (5,)], ids=str)
def test_bits_do_not_depend_on_the_size_of_the_slices(
    terms: str, compensated: bool, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(terms, torch.bfloat16, batch)
    for name in ("left", "right"):
        if given[name] is not None:
            # Sums of small integers are exact in any order.
            given[name] = given[name].round()
    start = torch.randn(*batch, 37, 61).bfloat16()
    results = []
    for size in (1, 300, 5000, 2**20):
        monkeypatch.setattr(chunks, "CHUNK", size)
        monkeypatch.setattr(lowrank_update, "COPIED", size)
        weight, correction = start.clone(), torch.ones(*batch, 37, 61, dtype=torch.int8)
        lowrank_update_(weight, **given, alpha=0.5, key=-9, correction=correction if compensated else None)
        results.append(join_24_bits(weight, correction))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], join_24_bits(start, torch.ones_like(correction)))


def test_stochastic_rounding_of_a_batch_is_that_of_one_long_matrix() -> None:
    """The counter is the position in the batch."""
    grad = torch.randn(3, 37, 61).bfloat16()
    batch, flat = (torch.ones(shape).bfloat16() for shape in ((3, 37, 61), (111, 61)))
    lowrank_update_(batch, None, None, grad=grad, row_scale=torch.full((3, 1, 1), 1e-3), key=4)
    lowrank_update_(flat, None, None, grad=grad.view(111, 61), row_scale=torch.full((1, 1), 1e-3), key=4)
    assert torch.equal(batch.view(111, 61), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", ["product", "product and rows", "both"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_no_temporary_as_large_as_the_weight(terms: str, dtype: torch.dtype, turned: bool, zeros: bool) -> None:
    given = operands(terms, dtype, zeros=zeros)
    weight = torch.ones(37, 61, dtype=dtype)
    weight = weight.mT.contiguous().mT if turned else weight
    roundings: list[dict[str, Any]] = [{}]
    if dtype == torch.bfloat16:
        roundings += [{"key": 3}, {"key": 3, "correction": torch.zeros(37, 61, dtype=torch.int8)}]
    for rounding in roundings:
        with CountTemporaries(weight.numel()) as count:
            lowrank_update_(weight, **given, alpha=0.1, decay=0.9, **rounding)
        assert count.created == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_as_numbers(dtype: torch.dtype) -> None:
    given = operands("product and rows", dtype)
    start = torch.randn(37, 61).to(dtype)
    results = []
    for alpha, decay in ((-0.25, 0.5), (torch.tensor(-0.25), torch.tensor([0.5]))):
        results.append(start.clone())
        lowrank_update_(results[-1], **given, alpha=alpha, decay=decay)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", ["product", "rows", "product and both"])
@pytest.mark.parametrize("which", ["alpha", "decay"])
def test_a_number_on_a_device_is_not_read(which: str, terms: str, dtype: torch.dtype) -> None:
    # On this device there is nothing to read.
    given = {name: None if value is None else value.to("meta") for name, value in operands(terms, dtype).items()}
    lowrank_update_(torch.ones(37, 61, dtype=dtype, device="meta"), **given, **{which: torch.ones((), device="meta")})


@pytest.mark.parametrize("rounding", ["key", "correction"])
def test_on_a_device_too_nothing_is_added_to_a_weight_that_is_rounded(rounding: str) -> None:
    weight = torch.ones(37, 61, dtype=torch.bfloat16, device="meta")
    left, right = (operands("product", torch.bfloat16)[side].to("meta") for side in ("left", "right"))
    options = {"key": {"key": 3}, "correction": {"correction": torch.empty_like(weight, dtype=torch.int8)}}
    with Products() as products:
        lowrank_update_(weight, left, right, **options[rounding])
    assert set(products.dtypes) == {torch.float32}
    with Products() as products:
        lowrank_update_(weight, left, right)
    assert set(products.dtypes) == {torch.bfloat16}


def test_a_gradient_without_scales_is_no_term() -> None:
    weight = torch.ones(4, 3)
    lowrank_update_(weight, None, torch.ones(3, 2), grad=torch.full((4, 3), 5.0), decay=0.5)
    assert torch.equal(weight, torch.full((4, 3), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_only_bfloat16_is_rounded_otherwise_than_to_nearest(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="with a key or a correction"):
        lowrank_update_(torch.ones(3, 3, dtype=dtype), None, None, key=1)


@pytest.mark.parametrize("terms", TERMS)
def test_an_int8_weight_is_moved_by_the_formula_whatever_the_slices(
    terms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(terms, torch.bfloat16, zeros=True)
    values = torch.randn(37, 61)
    results = []
    for size in (1, 300, 2**20):
        monkeypatch.setattr(lowrank_update, "COPIED", size)
        monkeypatch.setattr("lowrank_optim.ops.lowrank_update_int8.COPIED", size)
        codes, scale = torch.zeros(37, 61, dtype=torch.int8), torch.zeros(scale_shape(37, 61))
        quantize_int8_weight_(codes, scale, values)
        exact = formula(dequantize_int8_weight(codes, scale, torch.float64), given, -0.3, 0.9).real
        lowrank_update_int8_(codes, scale, **given, alpha=-0.3, decay=0.9, key=7)
        found = dequantize_int8_weight(codes, scale, torch.float64)
        assert bool(((found - exact).abs() <= 1.001 * scale).all())
        results.append(codes)
    # Another order of sums turns a rounding now and then.
    for other in results[1:]:
        assert float((results[0] != other).float().mean()) < 1e-3
