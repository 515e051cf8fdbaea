"""A kernel's batch is, matrix by matrix, what the eager operation makes of single ones."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.lowrank_update import lowrank_update_
from tests.conformance import nightly
from tests.ops.batches import with_kernels

NAMES = sorted(with_kernels((), torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("batch", [(2, 2), *nightly(((3,),))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_against_single_matrices(
    name: str, dtype: torch.dtype, batch: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("lowrank_kernels.gram"), "SYMMETRIC_FROM", 1)
    call = with_kernels(batch, device, dtype)[name]
    together = call.results(pick(call.operation, "triton", device))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for index in product(*map(range, batch)):
        for all_of_them, alone in zip(together, call.of(index).results(), strict=True):
            torch.testing.assert_close(all_of_them[index], alone, **tolerance)


@pytest.mark.parametrize("turned", ["weight", "left", "right", "grad"])
def test_layouts_of_a_batch(turned: str, device: torch.device) -> None:
    call = with_kernels((3,), device, torch.float32)["rows and columns"]
    strided = call._replace(tensors={**call.tensors, turned: call.tensors[turned].mT.contiguous().mT})
    kernel = pick(lowrank_update_, "triton", device)
    torch.testing.assert_close(strided.results(kernel), call.results(kernel))


def test_a_batch_in_a_larger_tensor(device: torch.device) -> None:
    """With strides of the batch that are those of none of its matrices."""
    call = with_kernels((3,), device, torch.float32)["rows"]
    padded = {}
    for name in ("weight", "left", "right", "grad"):
        tensor = call.tensors[name]
        wide = torch.full((3, tensor.shape[1] + 2, tensor.shape[2] + 3), float("nan"), device=device)
        padded[name] = wide[:, 1:-1, 3:].copy_(tensor)
    expected = call.results(pick(lowrank_update_, "triton", device))
    pick(lowrank_update_, "triton", device)(**{**call.tensors, **padded}, **call.options)
    torch.testing.assert_close(padded["weight"], expected[0])


@pytest.mark.parametrize("compensated", [False, True])
def test_rounding_of_a_batch_is_the_same_bits(compensated: bool, device: torch.device) -> None:
    weight, grad = (torch.randn(3, 37, 61, device=device).bfloat16() for _ in range(2))
    results = []
    for operation in (lowrank_update_, pick(lowrank_update_, "triton", device)):
        w, correction = weight.clone(), torch.ones(3, 37, 61, dtype=torch.int8, device=device)
        scale = torch.tensor([0.5, 0.0, 2.0**-9], device=device).view(3, 1, 1)
        pair = {"correction": correction} if compensated else {}
        operation(w, None, None, grad=grad, row_scale=scale, key=11, **pair)
        results.append((w, correction))
    (w, correction), (ours, our_correction) = results
    assert torch.equal(w, ours) and torch.equal(correction, our_correction) and not torch.equal(w, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_of_zero_hides_the_gradient(dtype: torch.dtype, device: torch.device) -> None:
    call = with_kernels((3,), device, dtype)["rows and columns"]
    grad, row_scale, column_scale = (call.tensors[name] for name in ("grad", "row_scale", "column_scale"))
    row_scale[:, 3], column_scale[1, :, 7] = 0, 0
    hidden = call._replace(tensors={**call.tensors, "grad": torch.where(row_scale * column_scale == 0, 0, grad)})
    grad[:, 3], grad[1, :, 7] = float("nan"), float("nan")
    kernel = pick(lowrank_update_, "triton", device)
    assert torch.equal(call.results(kernel)[0], hidden.results(kernel)[0])
    assert torch.equal(call.results()[0], hidden.results()[0])


@pytest.mark.parametrize("shape", [(37, 61), (7, 3), (1, 1)], ids=str)
def test_draws_of_a_batch(shape: tuple[int, int], device: torch.device) -> None:
    options = {"key": -5, "dtype": torch.float32, "device": device, "batch": (2, 3), "first": 4}
    ours = pick(gaussian, "triton", device)(*shape, **options)
    torch.testing.assert_close(ours, gaussian(*shape, **options), rtol=1e-5, atol=2e-6)


WRONG = {
    "left": lambda x: x[:, :-1],
    "right": lambda x: x[..., :-1],
    "grad": lambda x: x[:2],
    "row_scale": lambda x: x[:, :5],
    "column_scale": lambda x: x.mT,
    "source": lambda x: x[:, 1:],
    "addend": lambda x: x[..., 1:],
}
CALLS = {"source": "move_columns", "addend": "gram and addend"}


@pytest.mark.parametrize("kind", ["shape", "dtype", "device"])
@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_operand_is_refused(
    name: str, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("lowrank_kernels.gram"), "SYMMETRIC_FROM", 1)
    call = with_kernels((3,), device, torch.bfloat16)[CALLS.get(name, "rows and columns")]
    given = call.tensors[name]
    wrong = {
        "shape": WRONG[name](given),
        "dtype": given.to(torch.int16),
        "device": torch.empty_like(given, device="meta"),
    }
    found = call._replace(tensors={**call.tensors, name: wrong[kind]})
    with pytest.raises(ValueError, match=f"Invalid {name}: .*, expected"):
        found.results(pick(call.operation, "triton", device))
