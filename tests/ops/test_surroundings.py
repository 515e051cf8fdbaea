"""The caller's default device and dtype reach no operation on tensors that exist."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import nn as lowrank_nn
from lowrank_optim.nn import restarts
from lowrank_optim.ops import (
    blockwise,
    chunks,
    dct,
    dct_select,
    factors,
    fused_adam,
    gaussian,
    int4,
    int8_blocks,
    int8_weight,
    lost,
    orthonormal,
    project,
    rounding,
    sltrain,
    spectral_linear,
    support,
    triplets,
)
from lowrank_optim.ops.adafactor_direction import adafactor_direction
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.linear_cross_entropy import linear_cross_entropy
from lowrank_optim.ops.newton_schulz import newton_schulz
from tests.conformance import defaults
from tests.nn.parameterizations import VARIANTS, block

CPU = torch.device("cpu")


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=dtype, device=CPU)


def filled(shape: Any, dtype: torch.dtype, fill: float = 0) -> Tensor:
    return torch.full(tuple(shape), fill, dtype=dtype, device=CPU)


def grads(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    fresh = [leaf.requires_grad_() for leaf in leaves]
    y = run(*fresh)
    return [y.detach(), *torch.autograd.grad(y.sum(), fresh)]


def packing(count: int) -> list[Tensor]:
    index, pointers = support.empty_support((20, 48), count, CPU)
    support.pack_(index, pointers, support.draw_positions((20, 48), count, generator()), (20, 48))
    return [index, pointers, support.positions(index, pointers, (20, 48), count)]


def blockwise_codes(module: dict[str, Any], signed: bool) -> list[Tensor]:
    x = values(10, 40).square()
    codes, scale = filled((10, 40), torch.uint8), filled((2,), torch.float32)
    module["quantize_"](codes, scale, x, signed=signed)
    return [codes, scale, module["dequantize"](codes, scale, signed=signed)]


def four_bits() -> list[Tensor]:
    state = [filled((10, 20), torch.uint8), filled((2,), torch.float32), filled((2,), torch.uint8)]
    int4.quantize_int4_(*state, values(10, 40), group_size=256)
    return [*state, int4.dequantize_int4(*state, 40, group_size=256)]


def eight_bit_error() -> list[Tensor]:
    codes, scale = filled((10, 40), torch.int8), filled((10,), torch.float32)
    int8_blocks.quantize_(codes, scale, values(10, 40))
    return [codes, scale, int8_blocks.dequantize(codes, scale, torch.float32)]


def eight_bit_weight(key: int | None) -> list[Tensor]:
    codes, scale = filled((10, 300), torch.int8), filled((10, 2), torch.float32)
    int8_weight.quantize_int8_weight_(codes, scale, values(10, 300), key)
    return [codes, scale, int8_weight.dequantize_int8_weight(codes, scale, torch.bfloat16)]


def adam(**kwargs: Any) -> list[Tensor]:
    dtype = torch.bfloat16 if "keys" in kwargs else torch.float32
    moments = [filled((8, 6), dtype) for _ in range(2)]
    return [adam_direction(values(8, 6), *moments, beta1=0.9, beta2=0.99, eps=1e-8, **kwargs), *moments]


def adam_in_8_bits() -> list[Tensor]:
    state = [filled(s, d) for s, d in 2 * [((10, 40), torch.uint8), ((2,), torch.float32)]]
    return [adam8bit_direction(values(10, 40), *state, beta1=0.9, beta2=0.99, eps=1e-8), *state]


def adam_in_one_pass() -> list[Tensor]:
    # As if it were imported under these surroundings.
    module = runpy.run_path(fused_adam.__file__)
    tensors = [values(8, 6), values(8, 6), filled((8, 6), torch.float32), filled((8, 6), torch.float32)]
    assert module["fused_adam_fits"](*tensors)
    module["fused_adam_"](*tensors, beta1=0.9, beta2=0.99, eps=1e-8, alpha=-0.1)
    return tensors


def adafactor() -> list[Tensor]:
    row, col = filled((8,), torch.float32, 1e-3), filled((6,), torch.float32, 1e-3)
    return [adafactor_direction(values(8, 6), row, col, weight=0.1, eps=1e-30, clip_threshold=1.0), row, col]


def transformed(add_: Callable[[Tensor, Tensor], None], size: int) -> list[Tensor]:
    # The plan would be of the first surroundings.
    dct.PLANS.clear()
    out = filled((3, size), torch.float32)
    add_(out, values(3, size))
    return [out]


def sparse_layer() -> list[Tensor]:
    index, pointers, _ = packing(60)
    B, A, entries = values(20, 4), values(4, 48), values(60)

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        return sltrain.sltrain_linear(x, *parts, None, index, pointers, scale=0.5)

    return grads(run, values(5, 48), B, A, entries) + grads(run, values(60, 48), B, A, entries)


def lost_layer() -> list[Tensor]:
    channels = torch.tensor([1, 5, 6], dtype=torch.int32, device=CPU)

    def run(*parts: Tensor) -> Tensor:
        return lost.lost_linear(*parts, None, channels, gamma=0.7, silu=True)

    return grads(run, values(5, 16), values(12, 4), values(4, 16), values(12, 3))


def spectral_layer(tokens: int) -> list[Tensor]:
    frozen = values(12, 6), values(16, 6)

    def run(*parts: Tensor) -> Tensor:
        return spectral_linear.spectral_linear(*parts, *frozen, enhanced=True)

    return grads(run, values(tokens, 16), values(12, 4), values(10).abs(), values(16, 4))


def drawn_triplets() -> list[Tensor]:
    parts = triplets.Triplets(values(12, 4), values(12).abs(), values(16, 4), values(12, 8), values(16, 8))
    slots = triplets.draw_slots(parts.s, 4, generator())
    assert slots is not None
    triplets.activate_(parts, slots)
    assert triplets.decompose_(parts, triplets.compose(parts))
    triplets.normalize_columns_(parts.u)
    return [slots, *parts]


def cross_entropy() -> list[Tensor]:
    targets = torch.arange(9, device=CPU) % 7
    return grads(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk=4, reduction="mean"), values(9, 5), values(7, 5)
    )


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A model from before the surroundings."""
    with defaults("cpu", torch.float32):
        torch.manual_seed(0)
        return make()


def converted(name: str, from_weight: bool) -> list[Tensor]:
    model = built(block)
    lowrank_nn.convert(model, VARIANTS[name].options, from_weight=from_weight)
    ids = torch.arange(11, device=CPU)[None]
    y = model(ids)
    y.square().mean().backward()
    return [y, *model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]


def pruned_moments() -> list[Tensor]:
    state = {"exp_avg": values(8, 6), "exp_avg_sq": values(8, 6).square()}
    restarts._prune_moments_(state, 0.4, "random", generator())
    return list(state.values())


def int8_layers() -> list[Tensor]:
    model = built(lambda: nn.Sequential(nn.Linear(300, 20)))
    lowrank_nn.quantize_weights(model, "all")
    return [model(values(2, 300)), *model.state_dict().values()]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "adafactor": adafactor,
    "adam": adam,
    "adam, bf16 moments": partial(adam, keys=(1, 2)),
    "adam, 8 bits": adam_in_8_bits,
    "adam, one pass": adam_in_one_pass,
    "blockwise, signed": lambda: blockwise_codes(runpy.run_path(blockwise.__file__), True),
    "blockwise, unsigned": lambda: blockwise_codes(runpy.run_path(blockwise.__file__), False),
    "chunks": lambda: [chunks.column_norms(values(9, 5), 2)],
    "cross entropy": cross_entropy,
    "dct, matrix": lambda: [dct.dct_matrix(12)],
    "dct 2, even": lambda: transformed(dct.add_dct2_, 12),
    "dct 3, odd": lambda: transformed(dct.add_dct3_, 7),
    "dct, select": lambda: [dct_select.dct_select(values(9, 12), 4, ell_norm=1)],
    "factors, balance": lambda: list(factors.balance_factors(values(9, 3), values(3, 7))),
    "factors, retraction": lambda: list(
        factors.retracted_step(values(9, 3), values(3, 7), values(9, 3), values(3, 7), 0.1) or ()
    ),
    "gaussian": lambda: [gaussian.gaussian(9, 5, key=3, dtype=torch.float32, device=CPU)],
    "int4": four_bits,
    "int8 error": eight_bit_error,
    "int8 weight": partial(eight_bit_weight, None),
    "int8 weight, stochastic": partial(eight_bit_weight, 3),
    "int8 layers": int8_layers,
    "lost": lost_layer,
    "newton-schulz": lambda: [newton_schulz(values(9, 5))],
    "orthonormalize": lambda: [orthonormal.orthonormalize(values(9, 5))],
    "project": lambda: list(project.project(values(9, 5), values(5, 2))),
    "prune": pruned_moments,
    "range finder": lambda: [orthonormal.range_finder(values(40, 30), 4, generator())],
    "rounding": lambda: [rounding.round_to_bfloat16(values(9, 5), 3), *rounding.split_24_bits(values(9, 5), 3)],
    "sltrain": sparse_layer,
    "spectral, few tokens": partial(spectral_layer, 3),
    "spectral, many": partial(spectral_layer, 60),
    "support, positions": partial(packing, 3),
    "support, columns": partial(packing, 60),
    "support, bitmap": partial(packing, 400),
    "triplets": drawn_triplets,
    **{f"convert, {name}": partial(converted, name, False) for name in VARIANTS},
    **{f"convert, {name}, from weight": partial(converted, name, True) for name in VARIANTS},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)], ids=str)
def test_results_do_not_depend_on_defaults(name: str, device: str, dtype: torch.dtype) -> None:
    expected = CASES[name]()
    with defaults(device, dtype):
        found = CASES[name]()
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected):
        assert ours.device == theirs.device and ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
