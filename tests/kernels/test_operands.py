"""A wrapper launches nothing on an operand that does not fit the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops.blockwise import BLOCK
from lowrank_optim.ops.support import draw_positions, empty_support, pack_

M, N, R, T = 20, 48, 5, 7


def adam_direction() -> dict[str, Any]:
    return {
        "grad": torch.randn(M, N),
        "exp_avg": torch.zeros(M, N),
        "exp_avg_sq": torch.zeros(M, N),
        "eps": torch.tensor(1e-8),
        "norms": torch.zeros(2, M),
        "beta1": 0.9,
        "beta2": 0.99,
    }


def adam8bit_direction() -> dict[str, Any]:
    blocks = -(-M * N // BLOCK)
    return {
        "grad": torch.randn(M, N),
        "exp_avg_codes": torch.zeros(M, N, dtype=torch.uint8),
        "exp_avg_scale": torch.zeros(blocks),
        "exp_avg_sq_codes": torch.zeros(M, N, dtype=torch.uint8),
        "exp_avg_sq_scale": torch.zeros(blocks),
        "eps": torch.tensor(1e-8),
        "norms": torch.zeros(2, M),
        "beta1": 0.9,
        "beta2": 0.99,
    }


def gram() -> dict[str, Any]:
    return {"x": torch.randn(M, N).bfloat16(), "addend": torch.eye(N).bfloat16()}


def sparse(count: int) -> dict[str, Any]:
    index, pointers = empty_support((M, N), count, "cpu")
    pack_(index, pointers, draw_positions((M, N), count, torch.Generator().manual_seed(0)), (M, N))
    return {"index": index, "row_pointers": pointers}


def sddmm(count: int = 60) -> dict[str, Any]:
    return {"grad": torch.randn(T, M), "x": torch.randn(T, N), "count": count, **sparse(count)}


def sltrain_weight(count: int = 60) -> dict[str, Any]:
    values = torch.randn(count)
    return {"B": torch.randn(M, R), "A": torch.randn(R, N), "values": values, "scale": 0.5, **sparse(count)}


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1].clone()


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int16)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


ANY = (longer, shorter, elsewhere, other_dtype)
# Everything but the first operand, which says what the others must be, and what must be contiguous.
CASES: list[tuple[Callable[[], dict[str, Any]], tuple[str, ...], tuple[str, ...]]] = [
    (adam_direction, ("exp_avg", "exp_avg_sq", "norms"), ("exp_avg", "exp_avg_sq", "norms")),
    (
        adam8bit_direction,
        ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "norms"),
        ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "norms"),
    ),
    (gram, ("addend",), ()),
    (sddmm, ("x", "index", "row_pointers"), ("index", "row_pointers")),
    (sltrain_weight, ("A", "index", "row_pointers"), ("index", "row_pointers")),
]
WRONG = [
    (case, name, change)
    for case, operands, packed in CASES
    for name in operands
    for change in (*ANY, *([strided] if name in packed else []))
]
IDS = [f"{case.__name__}-{name}-{change.__name__}" for case, name, change in WRONG]


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(to_device(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@pytest.fixture
def run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], object]:
    monkeypatch.setattr(importlib.import_module("lowrank_kernels.gram"), "SYMMETRIC_FROM", 1)

    def call(name: str, operands: dict[str, Any]) -> object:
        moved = {key: to_device(value, device) for key, value in operands.items()}
        return getattr(importlib.import_module(f"lowrank_kernels.{name}"), name)(**moved)

    return call


@pytest.mark.parametrize(("case", "name", "change"), WRONG, ids=IDS)
def test_one_that_does_not_fit_is_refused(
    case: Callable[[], dict[str, Any]], name: str, change: Callable[[Tensor], Tensor],
    run: Callable[[str, dict[str, Any]], object],
) -> None:  # fmt: skip
    operands = case()
    if not operands[name].numel():
        pytest.skip("this packing has none")
    run(case.__name__, operands)
    operands[name] = change(operands[name])
    with pytest.raises(ValueError, match=rf"^Invalid {name}: .*, expected "):
        run(case.__name__, operands)


@pytest.mark.parametrize("case", [adam_direction, adam8bit_direction])
@pytest.mark.parametrize("eps", [torch.zeros(2), torch.zeros((), dtype=torch.int32), torch.zeros((), device="meta")])
def test_a_scalar_of_another_kind_is_refused(
    case: Callable[[], dict[str, Any]], eps: Tensor, run: Callable[[str, dict[str, Any]], object]
) -> None:
    with pytest.raises(ValueError, match=r"^Invalid eps: .*, expected a number or one element"):
        run(case.__name__, {**case(), "eps": eps})


def test_keys_of_another_dtype_are_refused(run: Callable[[str, dict[str, Any]], object]) -> None:
    operands = adam_direction()
    operands |= {name: operands[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    key = torch.tensor(1, dtype=torch.int32)
    run("adam_direction", {**operands, "keys": (key, key)})
    for keys in ((torch.tensor(1), key), (key, torch.tensor(1)), (key, key.to("meta")), (key, 1)):
        with pytest.raises(ValueError, match=r"^Invalid keys: "):
            run("adam_direction", {**operands, "keys": keys})


@pytest.mark.parametrize("case", [sddmm, sltrain_weight])
@pytest.mark.parametrize("count", [3, 60, 400], ids=["positions", "columns", "bitmap"])
def test_the_index_must_be_one_of_so_many_entries(
    case: Callable[[int], dict[str, Any]], count: int, run: Callable[[str, dict[str, Any]], object]
) -> None:
    operands = case(count)
    run(case.__name__, operands)
    for change in (longer, shorter):
        with pytest.raises(ValueError, match=r"^Invalid index: "):
            run(case.__name__, {**operands, "index": change(operands["index"])})
