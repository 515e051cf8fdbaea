"""Triton twin of ``lowrank_optim.ops.sddmm``: tiles of gradᵀ x that never leave the multiprocessor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import SPARSE, aot_case
from lowrank_kernels._support import INDICES, cdiv, check_operand, load_entries, tile_entries, unpacked
from lowrank_optim.ops.sddmm import sddmm as eager

BLOCK_M, BLOCK_N, BLOCK_T = 64, 128, 32
# As in sltrain_weight.
ENTRIES = 8

if not hasattr(tl, "gather"):
    raise ImportError(f"sddmm takes triton 3.3 or newer, found {triton.__version__}")


@triton.jit
def sddmm_kernel(
    grad_ptr,  # (T, m), rows contiguous
    x_ptr,  # (T, n), rows contiguous
    index_ptr,
    row_pointers_ptr,  # (m + 1,), not read where FLAT
    out_ptr,  # (count,)
    T,
    m,
    n,
    count,
    grad_stride,
    x_stride,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        g = tl.load(grad_ptr + t * grad_stride + row[None, :], mask=(t < T) & (row[None, :] < m), other=0.0)
        x = tl.load(x_ptr + t * x_stride + column[None, :], mask=(t < T) & (column[None, :] < n), other=0.0)
        # ieee: fp32 stays fp32 instead of TF32; without effect on 16 bits.
        total = tl.dot(tl.trans(g), x, total, input_precision="ieee")
    begin, end, origin = tile_entries(index_ptr, row_pointers_ptr, row, first, m, n, count, FLAT, BLOCK_N)
    most = tl.max(end - begin, 0)
    for start in range(0, most, ENTRIES):
        place = begin[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = place < end[:, None]
        local = tl.where(mask, load_entries(index_ptr, place, mask, FLAT) - origin[:, None], 0).to(tl.int32)
        tl.store(out_ptr + place, tl.gather(total, local, 1), mask=mask)


def sddmm(grad: Tensor, x: Tensor, index: Tensor, row_pointers: Tensor, *, count: int) -> Tensor:
    """See ``lowrank_optim.ops.sddmm``; fp64 stays with torch.

    Raises:
        ValueError: an x that does not fit the gradient, or an index that does not fit the two.
    """
    if grad.dtype == torch.float64:
        return eager(grad, x, index, row_pointers, count=count)
    (T, m), n = grad.shape, x.shape[-1]
    check_operand("x", x, (T, n), grad.device, (grad.dtype,), contiguous=False)
    check_operand("index", index, index.shape, grad.device, (torch.uint8, *INDICES))
    index, flat = unpacked(index, row_pointers, (m, n), count)
    grad, x = (part if part.stride(1) == 1 else part.contiguous() for part in (grad, x))
    out = torch.empty(count, dtype=grad.dtype, device=grad.device)
    sddmm_kernel[(cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N),)](
        grad, x, index, row_pointers, out, T, m, n, count, grad.stride(0), x.stride(0), FLAT=flat,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T, ENTRIES=ENTRIES, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def aot_cases():
    cases = []
    for dtype, index in SPARSE:
        types = dict.fromkeys(("grad_ptr", "x_ptr", "out_ptr"), f"*{dtype}")
        types |= {"index_ptr": index, "row_pointers_ptr": "*i32"}
        constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_T": BLOCK_T, "ENTRIES": ENTRIES}
        constants |= {"FLAT": index != "*i16", "num_warps": 8, "num_stages": 3}
        cases.append(aot_case(f"sddmm {dtype}, index {index[1:]}", sddmm_kernel, types, constants))
    return cases
