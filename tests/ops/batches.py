"""Calls of the operations on a batch of matrices, for tests of the eager functions and of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowrank_optim.ops.adafactor_direction import adafactor_direction
from lowrank_optim.ops.dct_select import dct_select
from lowrank_optim.ops.gram import gram
from lowrank_optim.ops.int4 import dequantize_int4, group_count, packed_shape, quantize_int4_
from lowrank_optim.ops.lowrank_update import lowrank_update_
from lowrank_optim.ops.move_columns import move_columns_
from lowrank_optim.ops.newton_schulz import newton_schulz
from lowrank_optim.ops.orthonormal import orthonormalize, range_finder, subspace_iteration
from lowrank_optim.ops.project import project
from lowrank_optim.ops.row_norms import row_norms

ROWS, COLUMNS, RANK = 37, 61, 5
GROUP_SIZE = 7


class Call(NamedTuple):
    """One call: an operation, tensors with leading axes for a batch, options, and the tensors that it writes."""

    operation: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = {}
    mutated: tuple[str, ...] = ()

    def of(self, index: tuple[int, ...]) -> Call:
        """The same of one matrix."""
        return self._replace(tensors={name: tensor[index] for name, tensor in self.tensors.items()})

    def results(self, operation: Callable[..., Any] | None = None) -> list[Tensor]:
        """What the operation, or its twin, returns and writes; the tensors of the call stay as they are."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        found = (operation or self.operation)(**tensors, **self.options)
        returned = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        return returned + [tensors[name] for name in self.mutated]


def with_kernels(batch: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Calls by name of the operations that have kernels."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, device=device).to(dtype)

    def positive(*shape: int) -> Tensor:
        return torch.rand(*batch, *shape, device=device) + 0.1

    product = {"left": random(ROWS, RANK), "right": random(COLUMNS, RANK)}
    weight, grad = {"weight": random(ROWS, COLUMNS)}, {"grad": random(ROWS, COLUMNS)}
    both = {"row_scale": positive(ROWS, 1), "column_scale": positive(1, COLUMNS)}
    moved: Any = {"options": {"alpha": -0.3, "decay": 0.9}, "mutated": ("weight",)}
    alone: Any = {"options": {"left": None, "right": None, "decay": 0.9}, "mutated": ("weight",)}
    # Norms so far apart that no order of a sum changes theirs.
    norms = torch.rand(*batch, 1, COLUMNS, device=device).argsort(-1) + 1
    source = torch.rand(*batch, RANK, device=device).argsort(-1)
    source[..., 1] = -1
    return {
        "product": Call(lowrank_update_, {**weight, **product}, **moved),
        "rows": Call(lowrank_update_, {**weight, **product, **grad, "row_scale": positive(ROWS, 1)}, **moved),
        "one number": Call(lowrank_update_, {**weight, **grad, "row_scale": positive(1, 1)}, **alone),
        "columns": Call(lowrank_update_, {**weight, **grad, "column_scale": positive(1, COLUMNS)}, **alone),
        "rows and columns": Call(lowrank_update_, {**weight, **product, **grad, **both}, **moved),
        "dct_select": Call(dct_select, {"scored": random(ROWS, COLUMNS).sign().float() * norms},
                           {"rank": RANK, "ell_norm": 2}),
        "move_columns": Call(move_columns_, {"matrix": random(ROWS, RANK), "source": source}, mutated=("matrix",)),
        "gram": Call(gram, {"x": random(ROWS, COLUMNS)}, {"alpha": 0.3}),
        "gram and addend": Call(gram, {"x": random(ROWS, RANK), "addend": gram(random(9, RANK))}, {"beta": -0.3}),
    }  # fmt: skip


def eager_only(batch: tuple[int, ...]) -> dict[str, Call]:
    """Calls by name of the others."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape)

    tall, packed = random(COLUMNS, ROWS), torch.zeros(*batch, *packed_shape(COLUMNS, RANK), dtype=torch.uint8)
    groups = group_count(COLUMNS, RANK, GROUP_SIZE)
    factors = {"row": random(COLUMNS).square(), "col": random(ROWS).square()}
    clip = {"weight": 0.3, "eps": 1e-30, "clip_threshold": 0.5, "per_matrix": True}

    def find(tall: Tensor) -> Tensor:
        basis = range_finder(tall, RANK, torch.Generator().manual_seed(0))
        # Signs of eigenvectors are the library's choice.
        return basis @ basis.mH

    def round_trip(**kwargs: Tensor) -> Tensor:
        quantize_int4_(**kwargs, group_size=GROUP_SIZE)
        kept = {name: kwargs[name] for name in ("codes", "scale", "zero")}
        return dequantize_int4(**kept, columns=RANK, group_size=GROUP_SIZE)

    storage = {"codes": packed, "scale": random(groups), "zero": torch.zeros(*batch, groups, dtype=torch.uint8)}
    return {
        "project": Call(project, {"grad": tall, "basis": random(ROWS, RANK)}),
        "row_norms": Call(row_norms, {"matrix": tall}),
        "orthonormalize": Call(orthonormalize, {"matrix": random(COLUMNS, RANK)}),
        "subspace_iteration": Call(subspace_iteration, {"tall": tall, "start": random(ROWS, RANK)}, {"iterations": 2}),
        # A spectrum with a gap, so that rounding does not turn the subspace.
        "range_finder": Call(find, {"tall": 10 * random(COLUMNS, RANK) @ random(RANK, ROWS) + 0.01 * tall}),
        "newton_schulz": Call(newton_schulz, {"tall": tall}),
        "adafactor": Call(adafactor_direction, {"low": tall, **factors}, clip, ("row", "col")),
        "int4": Call(round_trip, {"values": random(COLUMNS, RANK), **storage}, mutated=("codes", "scale", "zero")),
    }
