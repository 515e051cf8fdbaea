"""The kernel of int4 weights against the eager operation: the same codes, but where a sum in another order matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.nn import Int4Linear
from lowrank_optim.ops import pick
from lowrank_optim.ops.int4 import packed_shape, unpack
from lowrank_optim.ops.int4_weight import quantize_int4_weight_, scale_shape
from lowrank_optim.ops.lowrank_update_int4 import lowrank_update_int4_ as eager
from tests.kernels.test_lowrank_update_int8 import operands
from tests.optimizers import build
from tests.temporaries import CountTemporaries

# Half a byte unused beside a tail, a tail of 1, no whole group, only whole ones; rows below and above a tile.
SHAPES = [(5, 341, 5), (3, 257, 33), (70, 40, 16), (65, 256, 130), (1, 1, 1), (0, 300, 2), (4, 0, 2)]
TERMS = ["both", "product", "gradient"]
DTYPES = [torch.bfloat16, torch.float32]


def row(*case: Any) -> Any:
    """One fast case of every kind."""
    fast = case[0] == SHAPES[0] and case[2] == torch.bfloat16 and case[1] != "product"
    return pytest.param(*case, marks=[] if fast else pytest.mark.slow)


EVERY = [row(shape, terms, dtype) for shape in SHAPES for terms in TERMS for dtype in DTYPES]


def weight(m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(packed_shape(m, n), dtype=torch.uint8, device=device)
    scale = torch.zeros(scale_shape(m, n), device=device)
    values = torch.randn(m, n, device=device)
    values[: m // 3] *= 1e-3
    quantize_int4_weight_(codes, scale, values)
    return codes, scale


def check_alike(shape: tuple[int, int, int], device: torch.device, **given: Any) -> None:
    m, n, _ = shape
    codes, scale = weight(m, n, device)
    found = []
    for operation in (eager, pick(eager, "triton", device)):
        own, units = codes.clone(), scale.clone()
        operation(own, units, columns=n, **given)
        # All of the bytes, those without a second code too.
        found.append((unpack(own, 2 * own.shape[1]).int(), units))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=0)
    steps = (found[1][0] - found[0][0]).abs()
    assert steps.numel() == 0 or (steps.max() <= 1 and steps.float().mean() < 2e-3)


@pytest.mark.parametrize(("shape", "terms", "dtype"), EVERY, ids=str)
def test_the_codes_of_the_eager_operation(
    shape: tuple[int, int, int], terms: str, dtype: torch.dtype, device: torch.device
) -> None:
    given = operands(shape, dtype, device)
    if terms == "product":
        given["grad"] = given["row_scale"] = None
    elif terms == "gradient":
        given["left"] = given["right"] = None
    check_alike(shape, device, **given, alpha=-0.01, decay=0.99, key=5, step=70_000)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("scales", [(9, 131), (1, None)], ids=str)
def test_scales_layouts_and_scalars(scales: tuple[int, int | None], on_device: bool, device: torch.device) -> None:
    given = operands((9, 131, 5), torch.bfloat16, device)
    rows, columns = scales
    given["row_scale"] = torch.rand(rows, 1, device=device)
    given["column_scale"] = None if columns is None else torch.rand(1, columns, device=device)
    given |= {name: given[name].T.contiguous().T for name in ("left", "right", "grad")}
    scalars: dict[str, Any] = {"alpha": -0.01, "decay": 0.99, "key": -7, "step": 3}
    if on_device:
        # The count of updates is fp32 with capturable=True.
        dtypes = {"alpha": torch.float32, "decay": torch.float32, "key": torch.int32, "step": torch.float32}
        scalars = {name: torch.tensor(value, dtype=dtypes[name], device=device) for name, value in scalars.items()}
    check_alike((9, 131, 5), device, **given, **scalars)


def test_zeros_stay_zeros_and_what_does_not_fit_is_refused(device: torch.device) -> None:
    kernel = pick(eager, "triton", device)
    codes = torch.full((5, 151), 0x88, dtype=torch.uint8, device=device)
    scale, grad = torch.zeros(5, 3, device=device), torch.full((5, 301), float("nan"), device=device)
    none = torch.zeros(5, 1, device=device)
    kernel(codes, scale, None, None, columns=301, grad=grad, row_scale=none, key=1, step=1)
    assert bool((codes == 0x88).all()) and not scale.any()
    for wrong, columns, message in [
        (codes, 303, r"Invalid codes: \(5, 151\)"),
        (codes.to(torch.int8), 301, "Invalid codes"),
        (codes[:1].expand(2**17, 151), 2**15, "expected fewer than 2\\^31 elements"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(wrong, scale, None, None, columns=columns, key=1, step=1)


every_optimizer = pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GaLoreAdamW", {}),
        pytest.param("FiraAdamW", {"state_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param("APOLLOMini", {"scale": 2.0, "rank": 1}, marks=pytest.mark.slow),
    ],
)


@every_optimizer
@pytest.mark.parametrize("shape", [(9, 40), pytest.param((40, 9), marks=pytest.mark.slow)], ids=str)
def test_whole_optimizers(name: str, kwargs: dict[str, Any], shape: tuple[int, int], device: torch.device) -> None:
    layers = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        layer = Int4Linear(*shape, dtype=torch.bfloat16, device=device)
        optimizer = build(name, [layer.weight], backend=backend, weight_decay=0.1, lr=1e-3, **kwargs)
        for step in range(3):
            torch.manual_seed(step + 1)
            layer.weight.grad = torch.randn(shape[::-1], device=device).bfloat16()
            optimizer.step()
        layers.append(layer)
    one, other = (layer.dense_weight().float() for layer in layers)
    # Directions enter the kernel in bfloat16; where that turns a rounding, the values are a step apart.
    assert float(((one - other).abs() > 1e-6).float().mean()) < 0.02


@pytest.mark.slow
@every_optimizer
def test_no_full_size_temporary(name: str, kwargs: dict[str, Any], device: torch.device) -> None:
    layer = Int4Linear(64, 96, dtype=torch.bfloat16, device=device)
    optimizer = build(name, [layer.weight], backend="triton", weight_decay=0.1, **kwargs)
    layer.weight.grad = torch.randn(96, 64, device=device).bfloat16()
    optimizer.step()
    with CountTemporaries(layer.weight.numel()) as count:
        optimizer.step()
    assert count.created == []
