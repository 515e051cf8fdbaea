"""What the conformance tests over all rows of :mod:`tests.optimizers` share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.ops.rounding import join_24_bits
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.optimizers import IDS, VARIANTS, accepts, build


def nightly(*cases: Any) -> list[Any]:
    """Further cases of a table whose others run by default, for the nightly command."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


# One case of each kind and row runs by default.
FP32_AND_SLOW_BF16 = [torch.float32, *nightly(torch.bfloat16)]


def rows() -> Iterator[Any]:
    """Every row of the table: by default the first of each class, and few others that have all options together."""
    chosen = {name: number for number, (name, _) in reversed([*enumerate(VARIANTS)])}
    fast = {*chosen.values()}
    missing = {key for _, kwargs in VARIANTS for key in kwargs} - {key for i in fast for key in VARIANTS[i][1]}
    while missing:
        best = max(range(len(VARIANTS)), key=lambda i: len(missing & VARIANTS[i][1].keys()))
        fast.add(best)
        missing -= VARIANTS[best][1].keys()
    for number, (name, kwargs) in enumerate(VARIANTS):
        yield pytest.param(name, kwargs, id=IDS[number], marks=() if number in fast else pytest.mark.slow)


every_variant = pytest.mark.parametrize(("name", "kwargs"), list(rows()))

# Tall and wide matrices, one in a batch, a convolution, a vector: with rank 4 all but the last two are compressed.
SHAPES: list[tuple[int, ...]] = [(12, 7), (7, 12), (2, 9, 6), (6, 5, 3, 3), (3, 8), (11,)]


def quiet(name: str, params: Any, **kwargs: Any) -> LowRankOptimizer:
    """:func:`tests.optimizers.build` without the warning that nothing is compressed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*all get the full-rank rule")
        return build(name, params, **kwargs)


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within it the defaults of torch are others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def parameters(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same parameters in every call."""
    return [nn.Parameter(draw.to(dtype)) for draw in noise(shapes, 1)]


def noise(shapes: Iterable[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Normal numbers on the CPU, whatever the default device and dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) for shape in shapes]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients that depend on the step and the shapes only."""
    return [draw.to(p.dtype) for p, draw in zip(params, noise([p.shape for p in params], 100 + step))]


def train(optimizer: LowRankOptimizer, params: Sequence[nn.Parameter], steps: Iterable[int]) -> None:
    """Steps with the gradients of these numbers."""
    for step in steps:
        for p, grad in zip(params, gradients(params, step)):
            p.grad = grad
        optimizer.step()


def values(optimizer: LowRankOptimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """The weights, corrections included."""
    found = []
    for p in params:
        correction = optimizer.state[p].get("weight_correction")
        found.append(p.detach().clone() if correction is None else join_24_bits(p.detach(), correction))
    return found


def snapshot(optimizer: LowRankOptimizer) -> Any:
    """A copy of everything that an optimizer holds and of its parameters."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((groups, [p.detach() for p in params], [dict(optimizer.state.get(p, {})) for p in params]))


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, sequences and tensors are equal bit for bit; a NaN equals itself."""
    if isinstance(a, Tensor):
        fits = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return fits and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def without_draws(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A row that draws no random numbers, as close to the given one as there is."""
    fixed: dict[str, Any] = dict(kwargs)
    if accepts(name, "refresh"):
        fixed |= {"refresh": "svd", "selection": "top"} if accepts(name, "selection") else {"refresh": "svd"}
    if accepts(name, "proj"):
        fixed["proj"] = "svd"
    if accepts(name, "random_from"):
        fixed["random_from"] = 10**6
    if accepts(name, "leading"):
        fixed |= {"leading": None, "start": "svd"}
    if kwargs.get("projection", "columns") in ("columns", "random") and accepts(name, "projection"):
        fixed["projection"] = "dct" if "projection" in kwargs else "svd"
    return fixed
