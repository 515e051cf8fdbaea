"""Kernels against cuBLAS, torch's fused AdamW and the time of their bytes and FLOPs; the tiles that they could have.

The down-projection has no kernel: what cuBLAS takes for it in bf16, into fp32, and with the norms of the rows stands
among the figures, as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines import LR
from benchmarks.gpu.cases import (
    MAKER,
    Change,
    Maker,
    bf16_moments,
    in_fp32,
    stochastic,
    with_moments,
    with_norms,
    without_product,
)
from benchmarks.gpu.limits import limit_of
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting, kernel_module
from benchmarks.kernel_cases import SIZES, Case, Size
from lowrank_optim.ops.project import project
from lowrank_optim.ops.row_norms import row_norms

TINY = Size(rows=40, columns=24, rank=8, tokens=16)
# (rows, columns, rank) of the matrices of LLaMA-7B and 1B.
MATRICES = {
    "7B attention, rank 256": Size(4096, 4096, 256, 2048),
    "7B mlp, rank 256": Size(11008, 4096, 256, 2048),
    "7B attention, rank 1024": Size(4096, 4096, 1024, 2048),
    "1B mlp, rank 512": Size(5461, 2048, 512, 2048),
}
# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages.
TILES = [
    (64, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3),
    (256, 128, 64, 8, 3),
]  # fmt: skip
HEIGHTS = (32, 64, 128)
GRAMS = (1024, 2048, 4096)


def tasks(setting: Setting) -> list[Task]:
    matrices = MATRICES if setting.cuda else {"tiny": TINY}
    sizes = SIZES if setting.cuda else {"tiny": TINY}
    found = [Task(f"AdamW, {dtype}".replace("torch.", ""), partial(adamw, setting, dtype)) for dtype in DTYPES]
    for at, size in matrices.items():
        found += [Task(f"{name}, {at}", partial(library, setting, call, size)) for name, call in LIBRARY.items()]
        found += [
            Task(f"{label}, {at}", partial(kernel, setting, MAKER[name], size, change))
            for label, name, change in MEASURED
        ]
    found += [
        Task(f"{name}, {at}", partial(kernel, setting, maker, size, CHANGES.get(name, _same)))
        for at, size in sizes.items()
        for name, maker in MAKER.items()
    ]
    found += [Task(variant.name, partial(varied, setting, variant)) for variant in variants(setting)]
    for side in GRAMS if setting.cuda else (48,):
        found.append(Task(f"gram, {side}", partial(gram, setting, side)))
    return found


DTYPES = (torch.float32, torch.bfloat16)


def _same(case: Case) -> Case:
    return case


CHANGES: dict[str, Change] = {"adam_direction": with_moments, "adam8bit_direction": with_moments}
# What the tables of kernels against libraries are made of, beside the plain cases.
MEASURED: list[tuple[str, str, Change]] = [
    ("lowrank_update", "lowrank_update", _same),
    ("lowrank_update, stochastic", "lowrank_update", stochastic),
    ("rescaled_update, stochastic", "rescaled_update", stochastic),
    ("rescaled_columns, stochastic", "rescaled_columns", stochastic),
    ("rescaled_update, no product", "rescaled_update", lambda case: without_product(stochastic(case))),
    ("lowrank_update_int8", "lowrank_update_int8", _same),
    ("adam_direction", "adam_direction", with_moments),
    ("adam_direction, fp32, norms", "adam_direction", lambda case: with_norms(in_fp32(case))),
    ("adam_direction, bf16 moments", "adam_direction", bf16_moments),
    ("adam8bit_direction", "adam8bit_direction", with_moments),
]


def kernel(setting: Setting, make: Maker, size: Size, change: Change = _same) -> dict[str, Any]:
    """A kernel and eager, beside what a copy of as many bytes or a product of as many FLOPs takes."""
    case = change(make(size, setting.device))
    figures: dict[str, Any] = {"ms": setting.ms(case.bound("triton")), "eager_ms": setting.ms(case.bound("eager"))}
    figures |= {"bytes": case.moved, "flops": case.flops}
    figures |= {"tb_s": case.moved / figures["ms"] / 1e9, "tflop_s": case.flops / figures["ms"] / 1e9}
    limit = limit_of(setting.figures("limits"))
    if limit is not None:
        figures["limit_ms"] = limit.milliseconds(case.moved, case.flops)
        figures["share"] = figures["limit_ms"] / figures["ms"]
    return figures


def library(setting: Setting, call: Callable[[Tensor, Tensor, Tensor], Any], size: Size) -> dict[str, Any]:
    """A product as cuBLAS makes it, on bf16 operands of the same sizes."""
    large, low, basis = (
        torch.randn(shape, device=setting.device).bfloat16()
        for shape in ((size.rows, size.columns), (size.rows, size.rank), (size.columns, size.rank))
    )
    ms = setting.ms(lambda: call(large, low, basis))
    return {"ms": ms, "tflop_s": 2 * size.rows * size.columns * size.rank / ms / 1e9}


def turned(large: Tensor) -> Tensor:
    """The same numbers with the strides of a transposed matrix, as a wide gradient is oriented."""
    return large.view(large.shape[::-1]).mT


# On CUDA, `project` is torch.mm(out_dtype=torch.float32).
LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "cuBLAS down": lambda large, low, basis: large @ basis,
    "cuBLAS down, transposed": lambda large, low, basis: turned(large) @ basis,
    "cuBLAS down to fp32": lambda large, low, basis: project(large, basis),
    "cuBLAS down to fp32, transposed": lambda large, low, basis: project(turned(large), basis),
    "cuBLAS down to fp32, and norms": lambda large, low, basis: (project(large, basis), row_norms(large)),
    "norms": lambda large, low, basis: row_norms(large),
    "norms, transposed": lambda large, low, basis: row_norms(turned(large)),
    "cuBLAS up into the weight": lambda large, low, basis: large.addmm_(low, basis.mT, beta=0.999, alpha=-1e-3),
}


def adamw(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """torch's fused AdamW: a weight in and out, its gradient, two moments in and out."""
    p = nn.Parameter(torch.randn(2**26 if setting.cuda else 2**10, device=setting.device, dtype=dtype))
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW([p], lr=LR, fused=True)
    ms = setting.ms(optimizer.step)
    return {"ms": ms, "weights": p.numel(), "tb_s": 7 * p.numel() * p.element_size() / ms / 1e9}


class Variant(NamedTuple):
    """A kernel with other tiles, warps or stages than it chooses."""

    name: str
    kernel: str
    size: Size
    options: dict[str, int]


def variants(setting: Setting) -> list[Variant]:
    found = []
    for at, size in (MATRICES if setting.cuda else {"tiny": TINY}).items():
        kernel = "lowrank_update"
        for tile in TILES if setting.cuda else [(16, 16, 16, 4, 2)]:
            options = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))
            found.append(Variant(f"{kernel}, {at}, tile {tile}", kernel, size, options))
        for height in HEIGHTS if setting.cuda else HEIGHTS[:1]:
            kernel = "lowrank_update_int8"
            found.append(Variant(f"{kernel}, {at}, {height} rows", kernel, size, {"BLOCK_M": height}))
    return found


@contextmanager
def launched_with(variant: Variant, setting: Setting) -> Iterator[Case]:
    """The kernel's case, and within it the variant's options in the place of the kernel's own."""
    case = MAKER[variant.kernel](variant.size, setting.device)
    module = kernel_module(case.operation)
    before = module.launch_options
    module.launch_options = lambda *args, **kwargs: {**before(*args, **kwargs), **variant.options}
    try:
        yield case
    finally:
        module.launch_options = before


def varied(setting: Setting, variant: Variant) -> dict[str, Any]:
    with launched_with(variant, setting) as case:
        ms = setting.ms(case.bound("triton"))
    rates = {"tb_s": case.moved / ms / 1e9, "tflop_s": case.flops / ms / 1e9}
    return {"ms": ms, **rates, "options": variant.options}


def gram(setting: Setting, side: int) -> dict[str, Any]:
    """The triangle of a product and its whole."""
    case = MAKER["gram"](Size(2 * side, side, side, 16), setting.device)
    module = kernel_module(case.operation)
    before, module.SYMMETRIC_FROM = module.SYMMETRIC_FROM, 1
    try:
        ms = setting.ms(case.bound("triton"))
    finally:
        module.SYMMETRIC_FROM = before
    x = case.tensors["x"]
    return {"ms": ms, "cublas_ms": setting.ms(lambda: x.mT @ x)}
