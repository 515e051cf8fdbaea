"""The kernel against the eager operation: the same codes, but where a sum in another order crosses a random number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.nn import Int8Linear
from lowrank_optim.ops import pick
from lowrank_optim.ops.int8_weight import quantize_int8_weight_, scale_shape
from lowrank_optim.ops.lowrank_update_int8 import lowrank_update_int8_ as eager
from tests.conformance import FP32_AND_SLOW_BF16, nightly
from tests.optimizers import build
from tests.temporaries import CountTemporaries

# A tail of 85 (as in ffn 5461), of 1, no whole group, only whole ones; rows below and above a tile.
SHAPES = [(37, 341, 5), (3, 257, 33), (70, 40, 16), (65, 512, 130), (1, 1, 1), (0, 300, 2), (4, 0, 2)]


def weight(m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(m, n, dtype=torch.int8, device=device)
    scale = torch.zeros(scale_shape(m, n), device=device)
    values = torch.randn(m, n, device=device)
    values[: m // 3] *= 1e-3
    quantize_int8_weight_(codes, scale, values)
    return codes, scale


def operands(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    m, n, rank = shape
    left, right, grad = (torch.randn(size, device=device).to(dtype) for size in ((m, rank), (n, rank), (m, n)))
    return {"left": left, "right": right, "grad": grad, "row_scale": torch.rand(m, 1, device=device)}


def both(shape: tuple[int, int, int], device: torch.device, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales after the eager operation and after the kernel."""
    codes, scale = weight(*shape[:2], device)
    results = []
    for operation in (eager, pick(eager, "triton", device)):
        results.append((codes.clone(), scale.clone()))
        operation(*results[-1], **kwargs)
    return results


def check_alike(eagerly: tuple[Tensor, Tensor], by_kernel: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(by_kernel[1], eagerly[1], rtol=1e-5, atol=0)
    steps = (by_kernel[0].int() - eagerly[0].int()).abs()
    assert steps.numel() == 0 or (steps.max() <= 1 and steps.float().mean() < 1e-3)


@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", ["both", *nightly("product", "gradient")])
def test_the_codes_of_the_eager_operation(
    shape: tuple[int, int, int], dtype: torch.dtype, terms: str, device: torch.device
) -> None:
    given = operands(shape, dtype, device)
    if terms == "product":
        given["grad"] = given["row_scale"] = None
    elif terms == "gradient":
        given["left"] = given["right"] = None
    check_alike(*both(shape, device, **given, alpha=-0.01, decay=0.99, key=5))


@pytest.mark.parametrize("shapes", [(61, None), (None, 300), (1, None), (61, 300), (1, 300)], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_scales_layouts_and_scalars(
    shapes: tuple[int | None, int | None], on_device: bool, device: torch.device
) -> None:
    given = operands((61, 300, 5), torch.bfloat16, device)
    rows, columns = shapes
    given["row_scale"] = None if rows is None else torch.rand(rows, 1, device=device)
    given["column_scale"] = None if columns is None else torch.rand(1, columns, device=device)
    given |= {name: given[name].T.contiguous().T for name in ("left", "right", "grad")}
    scalars: dict[str, Any] = {"alpha": -0.01, "decay": 0.99, "key": -7}
    if on_device:
        dtypes = {"alpha": torch.float32, "decay": torch.float32, "key": torch.int32}
        scalars = {name: torch.tensor(value, dtype=dtypes[name], device=device) for name, value in scalars.items()}
    check_alike(*both((61, 300, 5), device, **given, **scalars))


def test_zeros_stay_zeros_and_rows_without_a_scale_do_not_see_their_gradient(device: torch.device) -> None:
    grad = torch.full((5, 300), float("nan"), device=device)
    for operation in (eager, pick(eager, "triton", device)):
        codes, scale = torch.zeros(5, 300, dtype=torch.int8, device=device), torch.zeros(5, 2, device=device)
        operation(codes, scale, None, None, grad=grad, row_scale=torch.zeros(5, 1, device=device), key=1)
        assert not codes.any() and not scale.any()


def test_more_than_a_counter_can_tell_apart_is_refused(device: torch.device) -> None:
    codes = torch.zeros(1, dtype=torch.int8, device=device).expand(2**16, 2**15)
    with pytest.raises(ValueError, match="expected fewer than 2\\^31 elements"):
        pick(eager, "triton", device)(codes, torch.zeros(0, device=device), None, None, key=0)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("QGaLoreAdamW8bit", {}),
    ("GaLoreAdamW", {"proj_type": "reverse_std"}),
    ("FiraAdamW", {"state_dtype": "int8"}),
    ("APOLLOMini", {"scale": 2.0, "rank": 1}),
]


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
@pytest.mark.parametrize("shape", [(9, 40), *nightly(((40, 9),))], ids=str)
def test_whole_optimizers(name: str, kwargs: dict[str, Any], shape: tuple[int, int], device: torch.device) -> None:
    weights = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        layer = Int8Linear(*shape, dtype=torch.bfloat16, device=device)
        optimizer = build(name, [layer.weight], backend=backend, weight_decay=0.1, lr=1e-3, **kwargs)
        for step in range(3):
            torch.manual_seed(step + 1)
            layer.weight.grad = torch.randn(shape[::-1], device=device).bfloat16()
            optimizer.step()
        weights.append(layer.dense_weight().float())
    start = nn.Linear(*shape).weight.std()
    # Directions enter the kernel in bfloat16, and where that turns a rounding the values are a step apart.
    assert float((weights[0] - weights[1]).square().mean().sqrt()) < 0.01 * start


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_no_full_size_temporary(name: str, kwargs: dict[str, Any], device: torch.device) -> None:
    layer = Int8Linear(64, 96, dtype=torch.bfloat16, device=device)
    optimizer = build(name, [layer.weight], backend="triton", weight_decay=0.1, **kwargs)
    layer.weight.grad = torch.randn(96, 64, device=device).bfloat16()
    optimizer.step()
    with CountTemporaries(layer.weight.numel()) as count:
        optimizer.step()
    # The interpreter copies what a kernel reads; that is no tensor of ours.
    assert count.created == []
