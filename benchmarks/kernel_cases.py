"""The operations that have kernels, with arguments of a given size and what they must move and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.adam_update import adam_update_
from lowrank_optim.ops.blockwise import BLOCK
from lowrank_optim.ops.dct_select import dct_select
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.gram import gram
from lowrank_optim.ops.int4 import dequantize_int4, group_count, packed_shape, quantize_int4_
from lowrank_optim.ops.limited_scale import limited_scale
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.lowrank_update_int4 import lowrank_update_int4_
from lowrank_optim.ops.lowrank_update_int8 import lowrank_update_int8_
from lowrank_optim.ops.move_columns import move_columns_
from lowrank_optim.ops.quantized_weight import INT4, INT8, Format
from lowrank_optim.ops.sddmm import sddmm
from lowrank_optim.ops.sketch import sketch
from lowrank_optim.ops.sltrain import sltrain_weight
from lowrank_optim.ops.support import draw_positions, empty_support, pack_
from lowrank_optim.pretrain.llama import PRESETS

SPARSITY = 0.05


class Size(NamedTuple):
    """A down_proj-like weight, transposed where that makes it tall: rows >= columns > rank."""

    rows: int
    columns: int
    rank: int
    tokens: int


# Odd sizes, several tiles of each kernel.
TINY = Size(rows=137, columns=130, rank=17, tokens=33)
SIZES = {
    model: Size(PRESETS[model].intermediate, PRESETS[model].hidden, rank, tokens=2048)
    for model, rank in (("llama_1b", 512), ("llama_7b", 1024))
}


class Case(NamedTuple):
    """One call of an operation.

    Attributes:
        operation: the eager function.
        tensors: arguments by name; floating-point ones but scales are made fp64 for the exact result.
        options: further arguments.
        moved: bytes that must be read or written, every operand once.
        flops: that must be done.
        mutated: names of the tensors that are results.
    """

    operation: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    moved: int
    flops: int = 0
    mutated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        beside = [name for name in ("addend", "row_scale", "column_scale") if name in self.tensors]
        return ", ".join([self.operation.__name__, *beside])

    def bound(self, backend: str) -> Callable[[], Any]:
        """The call, on these very tensors."""
        operation = pick(self.operation, backend, _device(self))
        return lambda: operation(**self.tensors, **self.options)

    def results(self, backend: str, *, exact: bool = False) -> list[Tensor]:
        """What the operation returns and writes, from copies of the tensors; ``exact`` computes in fp64."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        options = dict(self.options)
        if exact:
            # Scales belong to a storage format, which has one dtype.
            wide = {name for name, t in tensors.items() if t.is_floating_point() and not name.endswith("scale")}
            tensors = {name: t.double() if name in wide else t for name, t in tensors.items()}
            options.update({key: torch.float64 for key in options if key == "dtype"})
        found = pick(self.operation, backend, _device(self))(**tensors, **options)
        return [t for t in tree_leaves(found) if isinstance(t, Tensor)] + [tensors[name] for name in self.mutated]


def _device(case: Case) -> torch.device:
    devices = [tensor.device for tensor in case.tensors.values()] or [case.options["device"]]
    return devices[0]


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    """The cases of all operations, made one after the other: several of 7B do not fit side by side."""
    for make in MAKERS:
        yield make(size, device)


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def _adam_direction(size: Size, device: torch.device) -> Case:
    shape = (size.rows, size.rank)
    tensors = {
        "grad": _random(*shape, device=device),
        "exp_avg": torch.zeros(shape, device=device),
        "exp_avg_sq": torch.zeros(shape, device=device),
    }
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    # bf16 in; two fp32 moments in and out; fp32 out.
    moved = (2 + 16 + 4) * size.rows * size.rank
    return Case(adam_direction, tensors, options, moved, mutated=("exp_avg", "exp_avg_sq"))


def _adam8bit_direction(size: Size, device: torch.device) -> Case:
    shape, blocks = (size.rows, size.rank), -(-size.rows * size.rank // BLOCK)
    tensors = {"grad": _random(*shape, device=device)}
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors[f"{moment}_codes"] = torch.zeros(shape, dtype=torch.uint8, device=device)
        tensors[f"{moment}_scale"] = torch.zeros(blocks, device=device)
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    # bf16 in; two moments of a byte in and out, with their scales; fp32 out.
    moved = (2 + 4 + 4) * size.rows * size.rank + 16 * blocks
    return Case(adam8bit_direction, tensors, options, moved, mutated=tuple(tensors)[1:])


def _adam_update(size: Size, device: torch.device) -> Case:
    shape = (size.rows, size.rank)
    tensors = {"weight": _random(*shape, device=device), "grad": _random(*shape, device=device)}
    tensors |= {name: torch.zeros(shape, device=device) for name in ("exp_avg", "exp_avg_sq")}
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "alpha": -0.03, "decay": 0.99}
    # bf16 in; a bf16 weight and two fp32 moments in and out.
    moved = (2 + 4 + 16) * size.rows * size.rank
    return Case(adam_update_, tensors, options, moved, mutated=("exp_avg", "exp_avg_sq", "weight"))


def _limited_scale(size: Size, device: torch.device) -> Case:
    """Fira's, with what is to be projected back."""
    low, direction = (_random(size.rows, size.rank, device=device, dtype=torch.float32) for _ in range(2))
    norms = torch.stack([low.norm(dim=1), direction.norm(dim=1)])
    tensors = {
        "norms": norms,
        "grad_norms": 3 * low.norm(dim=1, keepdim=True),
        # So small that the limiter has something to do.
        "update_norm": direction.norm() / 4,
        "low": low,
        "direction": direction,
    }
    options = {"gamma": 1.01, "inner": 0.25, "back": 1.0, "dtype": torch.bfloat16}
    return Case(limited_scale, tensors, options, (4 + 4 + 2) * low.numel())


def _dequantize_int4(size: Size, device: torch.device) -> Case:
    values = _random(size.columns, size.rank, device=device)
    groups = group_count(size.columns, size.rank, BLOCK)
    tensors = {
        "codes": torch.zeros(packed_shape(size.columns, size.rank), dtype=torch.uint8, device=device),
        "scale": torch.zeros(groups, device=device),
        "zero": torch.zeros(groups, dtype=torch.uint8, device=device),
    }
    quantize_int4_(**tensors, values=values, group_size=BLOCK)
    options = {"columns": size.rank, "group_size": BLOCK, "dtype": torch.bfloat16}
    return Case(dequantize_int4, tensors, options, tensors["codes"].nbytes + values.nbytes)


def _product(size: Size, device: torch.device) -> dict[str, Tensor]:
    left = _random(size.rows, size.rank, device=device)
    return {"left": left, "right": _random(size.columns, size.rank, device=device)}


def _lowrank_update(size: Size, device: torch.device) -> Case:
    m, n, r = size.rows, size.columns, size.rank
    tensors = {"weight": _random(m, n, device=device), **_product(size, device)}
    moved = 2 * (2 * m * n + m * r + n * r)
    return Case(lowrank_update_, tensors, {"alpha": -0.03}, moved, flops=2 * m * n * r, mutated=("weight",))


def _rescaled(size: Size, device: torch.device, *scales: Tensor) -> Case:
    """An update with a gradient, whose rows, columns or both are scaled."""
    case = _lowrank_update(size, device)
    grad = _random(size.rows, size.columns, device=device)
    named = {"row_scale" if scale.shape[1] == 1 else "column_scale": scale for scale in scales}
    moved = case.moved + grad.nbytes + sum(scale.nbytes for scale in scales)
    return case._replace(tensors={**case.tensors, "grad": grad, **named}, moved=moved)


def _rescaled_update(size: Size, device: torch.device) -> Case:
    """Of a tall weight."""
    return _rescaled(size, device, torch.rand(size.rows, 1, device=device))


def _rescaled_columns(size: Size, device: torch.device) -> Case:
    """Of a wide weight, in its own layout."""
    return _rescaled(size, device, torch.rand(1, size.columns, device=device))


def _two_sided_update(size: Size, device: torch.device) -> Case:
    scales = torch.rand(size.rows, 1, device=device), torch.rand(1, size.columns, device=device)
    return _rescaled(size, device, *scales)


def _quantized_update(
    size: Size, device: torch.device, stored: Format, operation: Callable[..., Any], **options: int
) -> Case:
    m, n, r = size.rows, size.columns, size.rank
    codes = torch.zeros(stored.codes_shape(m, n), dtype=stored.dtype, device=device)
    scale = torch.zeros(stored.scale_shape(m, n), device=device)
    stored.quantize_(codes, scale, _random(m, n, device=device))
    tensors = {"codes": codes, "scale": scale, **_product(size, device)}
    moved = 2 * (codes.nbytes + scale.nbytes) + 2 * r * (m + n)
    given = {"alpha": -0.03, "key": 5, **options}
    return Case(operation, tensors, given, moved, flops=2 * m * n * r, mutated=("codes", "scale"))


def _lowrank_update_int8(size: Size, device: torch.device) -> Case:
    return _quantized_update(size, device, INT8, lowrank_update_int8_)


def _lowrank_update_int4(size: Size, device: torch.device) -> Case:
    return _quantized_update(size, device, INT4, lowrank_update_int4_, columns=size.columns, step=3)


def _gaussian(size: Size, device: torch.device) -> Case:
    options = {"rows": size.columns, "columns": size.rank, "key": 3, "dtype": torch.float32, "device": device}
    return Case(gaussian, {}, options, 4 * size.columns * size.rank)


def _sketch(size: Size, device: torch.device) -> Case:
    grad = _random(size.rows, size.columns, device=device)
    options = {"rank": size.rank, "key": 3, "scale": size.rank**-0.5}
    return Case(sketch, {"grad": grad}, options, grad.nbytes + 2 * size.columns * size.rank + 4 * size.rows)


def _dct_select(size: Size, device: torch.device) -> Case:
    # Norms so far apart that no order of a sum changes theirs.
    norms = torch.randperm(size.columns, device=device) + 1
    scored = _random(size.rows, size.columns, device=device, dtype=torch.float32).sign() * norms
    moved = 4 * size.rows * size.columns
    return Case(dct_select, {"scored": scored}, {"rank": size.rank, "ell_norm": 2}, moved)


def _move_columns(size: Size, device: torch.device) -> Case:
    source = torch.randperm(size.rank, device=device)
    source[::3] = -1
    matrix = _random(size.rows, size.rank, device=device, dtype=torch.float32)
    moved = 8 * size.rows * size.rank
    return Case(move_columns_, {"matrix": matrix, "source": source}, {}, moved, mutated=("matrix",))


def _gram(size: Size, device: torch.device) -> Case:
    moved = 2 * size.rank * (size.rows + size.rank)
    x = _random(size.rows, size.rank, device=device)
    return Case(gram, {"x": x}, {}, moved, flops=size.rows * size.rank * (size.rank + 1))


def _square(size: Size, device: torch.device) -> Case:
    x = _random(size.rows, size.rank, device=device)
    g = gram(x) / size.rows
    options = {"alpha": 2.0315, "beta": -4.775}
    return Case(gram, {"x": g, "addend": g}, options, 4 * size.rank**2, flops=size.rank**2 * (size.rank + 1))


def _support(size: Size, device: torch.device) -> tuple[Tensor, Tensor, int]:
    shape = (size.rows, size.columns)
    count = int(SPARSITY * size.rows * size.columns)
    index, row_pointers = empty_support(shape, count, None)
    pack_(index, row_pointers, draw_positions(shape, count), shape)
    return index.to(device), row_pointers.to(device), count


def _sltrain_weight(size: Size, device: torch.device) -> Case:
    index, row_pointers, count = _support(size, device)
    m, n, r = size.rows, size.columns, size.rank
    tensors = {
        "B": _random(m, r, device=device),
        "A": _random(r, n, device=device),
        "values": _random(count, device=device),
        "index": index,
        "row_pointers": row_pointers,
    }
    moved = 2 * (m * n + m * r + r * n + count) + index.nbytes + row_pointers.nbytes
    return Case(sltrain_weight, tensors, {"scale": 0.03}, moved, flops=2 * m * n * r)


def _sddmm(size: Size, device: torch.device) -> Case:
    index, row_pointers, count = _support(size, device)
    tensors = {
        "grad": _random(size.tokens, size.rows, device=device),
        "x": _random(size.tokens, size.columns, device=device),
        "index": index,
        "row_pointers": row_pointers,
    }
    moved = 2 * (size.tokens * (size.rows + size.columns) + count) + index.nbytes + row_pointers.nbytes
    return Case(sddmm, tensors, {"count": count}, moved, flops=2 * size.tokens * size.rows * size.columns)


# Those that most methods launch in every step, and the others.
MOST_USED = (
    _adam_direction, _adam8bit_direction, _lowrank_update, _rescaled_update, _rescaled_columns, _two_sided_update,
    _lowrank_update_int8, _gaussian, _sketch, _adam_update, _limited_scale,
)  # fmt: skip
MAKERS = (
    *MOST_USED, _lowrank_update_int4, _dequantize_int4, _dct_select, _move_columns, _gram, _square, _sltrain_weight,
    _sddmm,
)  # fmt: skip
