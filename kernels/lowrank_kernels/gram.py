"""Triton twin of ``lowrank_optim.ops.gram``: the tiles on and below the diagonal, each stored twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import aot_case
from lowrank_kernels._support import cdiv, check_operand
from lowrank_optim.ops.chunks import as_batch
from lowrank_optim.ops.gram import gram as eager

BLOCK = 64
BLOCK_K = 64
# Milliseconds of this kernel and of cuBLAS, measured on an H200: 0.030 and 0.012 at 1024, 0.062 and 0.047 at 2048, 0.45
# and 0.38 at 4096 (benchmarks/results/gpu.jsonl). Larger ones are not measured.
SYMMETRIC_FROM = 8192


@triton.jit
def gram_kernel(
    x_ptr,  # (matrices, rows, columns)
    addend_ptr,  # (matrices, columns, columns), symmetric, contiguous; not read without ADD
    out_ptr,  # (matrices, columns, columns), contiguous
    rows,
    columns,
    matrix_stride,
    row_stride,
    column_stride,
    alpha,
    beta,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tile t of the triangle is (i, j), t = i (i + 1) / 2 + j with j <= i; the root may be off by one.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * matrix_stride
    addend_ptr += matrix * columns * columns
    out_ptr += matrix * columns * columns
    left = i * BLOCK + tl.arange(0, BLOCK)
    right = j * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, rows, BLOCK_K):
        k = start + ks
        at = x_ptr + k[:, None].to(tl.int64) * row_stride
        inside = k[:, None] < rows
        a = tl.load(at + left[None, :] * column_stride, mask=inside & (left[None, :] < columns), other=0.0)
        b = tl.load(at + right[None, :] * column_stride, mask=inside & (right[None, :] < columns), other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    total = alpha * total
    place = left[:, None] * columns + right[None, :]
    mask = (left[:, None] < columns) & (right[None, :] < columns)
    if ADD:
        total += beta * tl.load(addend_ptr + place, mask=mask, other=0.0).to(tl.float32)
    mirrored = tl.trans(total)
    # On the diagonal one triangle gives both: a tile's product with itself is symmetric only if the order of sums is.
    total = tl.where((i != j) | (left[:, None] >= right[None, :]), total, mirrored)
    tl.store(out_ptr + place, total, mask=mask)
    if i != j:
        tl.store(out_ptr + right[:, None] * columns + left[None, :], mirrored, mask=tl.trans(mask))


def gram(x: Tensor, addend: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """See ``lowrank_optim.ops.gram``; small products and those of more than 16 bits stay with torch.

    Raises:
        ValueError: an addend of another shape, dtype or device.
    """
    *batch, rows, columns = x.shape
    if columns < SYMMETRIC_FROM or x.dtype not in (torch.bfloat16, torch.float16):
        return eager(x, addend, alpha=alpha, beta=beta)
    check_operand("addend", addend, (*batch, columns, columns), x.device, (x.dtype,), contiguous=False)
    out = torch.empty(*batch, columns, columns, dtype=x.dtype, device=x.device)
    if out.numel():
        x = as_batch("x", x)
        blocks = cdiv(columns, BLOCK)
        gram_kernel[(blocks * (blocks + 1) // 2, x.shape[0])](
            x, out if addend is None else addend.contiguous(), out, rows, columns, *x.stride(), alpha, beta,
            ADD=addend is not None, BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


def aot_cases():
    types = {**dict.fromkeys(("x_ptr", "addend_ptr", "out_ptr"), "*bf16"), "alpha": "fp32", "beta": "fp32"}
    constants = {"column_stride": 1, "BLOCK": BLOCK, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 2}
    return [
        aot_case(label, gram_kernel, types, {**constants, "ADD": add})
        for label, add in (("gram", False), ("gram, addend", True))
    ]
