"""Triton twin of ``lowrank_optim.ops.project``: a product that squares its left operand on the way."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels.tiles import add_product, check, tile_options
from lowrank_optim.ops.chunks import as_batch


@triton.jit
def project_kernel(
    grad_ptr,  # (matrices, rows, d)
    basis_ptr,  # (matrices, d, rank), dtype of the gradient
    low_ptr,  # (matrices, rows, rank) fp32, contiguous
    norms_ptr,  # (matrices, rows) fp32, contiguous
    rows,
    d,
    rank,
    grad_stride_e,
    grad_stride_m,
    grad_stride_k,
    basis_stride_e,
    basis_stride_k,
    basis_stride_n,
    WIDE: tl.constexpr,  # 2^31 elements or more in a matrix
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    grad_ptr += matrix * grad_stride_e
    basis_ptr += matrix * basis_stride_e
    low_ptr += matrix * rows * rank
    norms_ptr += matrix * rows
    # Tiles of the same rows are neighbours, so that all but one find their gradient in L2.
    tiles_n = tl.cdiv(rank, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # Past the end they are read from the start instead: no mask, and nobody looks at the result.
    read = row % rows
    if WIDE:
        read = read.to(tl.int64)
    grad = grad_ptr + read[:, None] * grad_stride_m + steps[None, :] * grad_stride_k
    basis = basis_ptr + steps[:, None] * basis_stride_k + (column % rank)[None, :] * basis_stride_n
    low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        inside = steps < d - k
        a = tl.load(grad, mask=inside[None, :], other=0.0)
        b = tl.load(basis, mask=inside[:, None], other=0.0)
        low = add_product(a, b, low, PRECISION)
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        grad += BLOCK_K * grad_stride_k
        basis += BLOCK_K * basis_stride_k
    mask = (row < rows)[:, None] & (column < rank)[None, :]
    tl.store(low_ptr + row[:, None] * rank + column[None, :], low, mask=mask)
    tl.store(norms_ptr + row, tl.sqrt_rn(squares), mask=(row < rows) & (tile_n == 0))


def project(grad: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """See ``lowrank_optim.ops.project``; computed in fp32.

    Raises:
        ValueError: a gradient of another dtype, or a basis of another shape, device or kind than it asks for.
    """
    check("grad", grad, grad.shape, grad.device, torch.float32, torch.bfloat16, torch.float16)
    *batch, rows, d = grad.shape
    rank = basis.shape[-1]
    check("basis", basis, (*batch, d, rank), grad.device)
    grad, basis = as_batch("grad", grad), as_batch("basis", basis).to(grad.dtype)
    low = torch.empty(*batch, rows, rank, dtype=torch.float32, device=grad.device)
    norms = torch.empty(*batch, rows, 1, dtype=torch.float32, device=grad.device)
    if norms.numel():
        options = launch_options(grad.dtype, rank)
        tiles = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(rank, options["BLOCK_N"])
        project_kernel[(tiles, grad.shape[0])](
            grad, basis, low, norms, rows, d, rank, *grad.stride(), *basis.stride(),
            WIDE=rows * d >= 2**31, **options,
        )  # fmt: skip
    return low, norms


def launch_options(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Tiles, warps and stages.

    The result is thin, so its tiles are lower than those of other products: 4096 rows and a rank of 256 are 128 of
    them, about one for each of the 132 processors of an H100.
    """
    options = tile_options(dtype)
    # Without tensor cores longer steps would spill registers.
    options |= {"BLOCK_K": 16} if options["PRECISION"] == "ieee" else {"BLOCK_M": 64, "num_stages": 4}
    return {**options, "BLOCK_N": min(options["BLOCK_N"], max(16, triton.next_power_of_2(rank)))}


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, object], dict[str, int]]]:
    """What Fira and APOLLO launch on LLaMA's matrices: label, kernel, signature, constants, options."""
    cases = []
    for dtype, rank, contiguous in product(("bf16", "fp32"), (1, 256), ("grad_stride_k", "grad_stride_m")):
        options = launch_options(torch.bfloat16 if dtype == "bf16" else torch.float32, rank)
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, object] = {**options, contiguous: 1, "basis_stride_n": 1}
        constants |= {"WIDE": False}
        types = {"grad_ptr": f"*{dtype}", "basis_ptr": f"*{dtype}", "low_ptr": "*fp32", "norms_ptr": "*fp32"}
        names = project_kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        label = f"project {dtype} rank {rank}{' transposed' if contiguous == 'grad_stride_m' else ''}"
        cases.append((label, project_kernel, signature, constants, launch))
    return cases
