"""The kernel against fp64, relative to the error of the eager operation; rounding bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.lowrank_update import lowrank_update_ as eager
from lowrank_optim.ops.rounding import join_24_bits
from lowrank_optim.optim.state_storage import position

SHAPES = [(61, 37, 5), (1, 40, 3), (130, 1, 1), (64, 64, 16), (37, 200, 130), (0, 8, 2)]


def operands(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    m, n, rank = shape
    left, right, grad = (torch.randn(size, device=device).to(dtype) for size in ((m, rank), (n, rank), (m, n)))
    return {"left": left, "right": right, "grad": grad, "row_scale": torch.rand(m, 1, device=device)}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", ["product", "gradient", "both"])
def test_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype, terms: str, device: torch.device) -> None:
    given = operands(shape, dtype, device)
    if terms == "product":
        given["grad"] = given["row_scale"] = None
    elif terms == "gradient":
        given["left"] = given["right"] = None
    weight = torch.randn(shape[:2], device=device).to(dtype)
    results = [weight.clone(), weight.clone(), weight.double()]
    exact = {k: None if v is None else v.double() for k, v in given.items()}
    pick(eager, "triton", device)(results[0], **given, alpha=-0.1, decay=0.99)
    eager(results[1], **given, alpha=-0.1, decay=0.99)
    eager(results[2], **exact, alpha=-0.1, decay=0.99)
    ours, theirs, truth = results
    assert distance(ours, truth) <= 1.5 * distance(theirs, truth) + 1e-6 * float(truth.norm())


@pytest.mark.parametrize("against", ["weight", "grad", "left", "right", "everything"])
def test_operands_against_their_layout(against: str, device: torch.device) -> None:
    given = operands((61, 37, 5), torch.bfloat16, device)
    weight = torch.randn(61, 37, device=device).bfloat16()
    plain, turned = weight.clone(), weight.clone()
    kernel = pick(eager, "triton", device)
    kernel(plain, **given, key=3)
    strided = {
        k: v.T.contiguous().T if against in (k, "everything") and k != "row_scale" else v for k, v in given.items()
    }
    if against in ("weight", "everything"):
        turned = weight.T.contiguous().T
    kernel(turned, **strided, key=3)
    assert torch.equal(plain, turned)


SCALES: list[dict[str, tuple[int, int]]] = [
    {"row_scale": (61, 1)},
    {"row_scale": (1, 1)},
    {"column_scale": (1, 37)},
    {"row_scale": (61, 1), "column_scale": (1, 37)},
    {"row_scale": (1, 1), "column_scale": (1, 37)},
]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_the_scales_of_the_gradient(scales: dict[str, tuple[int, int]], device: torch.device) -> None:
    grad = torch.randn(61, 37, device=device)
    scaling = {name: torch.rand(shape, device=device) for name, shape in scales.items()}
    weights = [torch.ones(61, 37, device=device) for _ in range(2)]
    for weight, operation in zip(weights, (eager, pick(eager, "triton", device))):
        operation(weight, None, None, grad=grad, **scaling)
    torch.testing.assert_close(*weights)


def test_rows_without_a_scale_do_not_see_their_gradient(device: torch.device) -> None:
    grad = torch.full((61, 37), float("nan"), device=device)
    row_scale = torch.zeros(61, 1, device=device)
    for operation in (eager, pick(eager, "triton", device)):
        weight = torch.ones(61, 37, device=device)
        operation(weight, None, None, grad=grad, row_scale=row_scale)
        assert bool((weight == 1).all())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_rounding_is_the_same_bits(compensated: bool, turned: bool, on_device: bool, device: torch.device) -> None:
    """Of what has no product: the values before rounding are then the same bits as well."""
    weight = torch.randn(70, 150, device=device).bfloat16()
    weight = weight.T.contiguous().T if turned else weight
    grad, row_scale = torch.randn(70, 150, device=device).bfloat16(), torch.tensor([[2.0**-9]], device=device)
    key = torch.tensor(-77, dtype=torch.int32, device=device) if on_device else -77
    results = []
    for operation in (eager, pick(eager, "triton", device)):
        # clone() keeps the strides.
        w, correction = weight.clone(), torch.arange(70 * 150, device=device).view(70, 150).to(torch.int8)
        pair = {"correction": correction} if compensated else {}
        alpha, decay = (torch.tensor(x, device=device) if on_device else x for x in (1.0, 1.0))
        operation(w, None, None, grad=grad, row_scale=row_scale, key=key, alpha=alpha, decay=decay, **pair)
        results.append((w, correction))
    (w, correction), (ours, our_correction) = results
    assert torch.equal(w, ours) and torch.equal(correction, our_correction) and not torch.equal(w, weight)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    ("shape", "part"),
    [((22, 35), (-2, 6, 9)), ((22, 35), (-1, 6, 9)), ((3, 22, 35), (-2, 6, 9)), ((3, 22, 35), (-1, 6, 9))],
)
def test_a_part_is_rounded_as_in_the_whole(
    shape: tuple[int, ...], part: tuple[int, int, int], compensated: bool, backend: str, device: torch.device
) -> None:
    axis, first, length = part
    grad, row_scale = torch.randn(shape, device=device), torch.full((1,) * len(shape), 2.0**-9, device=device)
    row_scale = row_scale.expand(*shape[:-2], 1, 1).contiguous()
    whole, correction = (
        torch.randn(shape, device=device).bfloat16(),
        torch.zeros(shape, dtype=torch.int8, device=device),
    )
    parts = [tensor.narrow(axis, first, length).clone() for tensor in (whole, correction, grad)]
    # As a process knows it of its part of a parameter.
    state = {"axis": axis, "first": first, "length": shape[axis]}
    kernel = pick(eager, backend, device)
    starts: tuple[Any, ...] = (0, position(state, parts[0], weight=True))
    for (w, c, g), start in zip([(whole, correction, grad), parts], starts):
        kernel(w, None, None, grad=g, row_scale=row_scale, key=5, correction=c if compensated else None, start=start)
    expected = [tensor.narrow(axis, first, length) for tensor in (whole, correction)]
    assert torch.equal(parts[0], expected[0]) and torch.equal(parts[1], expected[1])


def test_a_rounded_product_is_that_of_the_eager_operation_but_for_its_last_bit(device: torch.device) -> None:
    given = operands((61, 37, 5), torch.bfloat16, device)
    weight = torch.randn(61, 37, device=device).bfloat16()
    for compensated in (False, True):
        values = []
        for operation in (eager, pick(eager, "triton", device)):
            w, correction = weight.clone(), torch.zeros(61, 37, dtype=torch.int8, device=device)
            operation(w, **given, alpha=0.01, key=5, correction=correction if compensated else None)
            values.append(join_24_bits(w, correction) if compensated else w.float())
        # Another order of sums turns a rounding now and then.
        assert float((values[0] != values[1]).float().mean()) < (0.2 if compensated else 1e-2)
        torch.testing.assert_close(*values, rtol=2.0**-15 if compensated else 2.0**-7, atol=1e-5)


@pytest.mark.parametrize(("dtype", "key"), [(torch.float64, None), (torch.float32, 1), (torch.float16, 1)])
def test_other_dtypes_are_refused(dtype: torch.dtype, key: int | None, device: torch.device) -> None:
    weight = torch.ones(4, 4, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=r"Invalid weight: .*, expected"):
        pick(eager, "triton", device)(weight, None, None, key=key)
