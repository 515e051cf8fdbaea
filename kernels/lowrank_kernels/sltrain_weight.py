"""Triton twin of ``lowrank_optim.ops.sltrain.sltrain_weight``: W is written tile by tile, with its entries of S."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels._cases import SPARSE, aot_case
from lowrank_kernels._support import INDICES, cdiv, check_operand, load_entries, tile_entries, unpacked
from lowrank_optim.ops.sltrain import sltrain_weight as eager

BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 32
# Of a row's entries in a tile that are added at once: at 5 percent and 128 columns there are 6 on average.
ENTRIES = 8


@triton.jit
def sltrain_weight_kernel(
    B_ptr,  # (m, r) contiguous
    A_ptr,  # (r, n) contiguous
    values_ptr,  # (count,)
    index_ptr,
    row_pointers_ptr,  # (m + 1,), not read where FLAT
    W_ptr,  # (m, n) contiguous
    m,
    n,
    r,
    count,
    scale,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, r, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b = tl.load(B_ptr + row[:, None] * r + k[None, :], mask=(row[:, None] < m) & (k[None, :] < r), other=0.0)
        a = tl.load(A_ptr + k[:, None] * n + column[None, :], mask=(k[:, None] < r) & (column[None, :] < n), other=0.0)
        # ieee: fp32 stays fp32 instead of TF32; without effect on 16 bits.
        total = tl.dot(b, a, total, input_precision="ieee")
    at = W_ptr + row[:, None].to(tl.int64) * n
    tl.store(at + column[None, :], scale * total, mask=(row[:, None] < m) & (column[None, :] < n))
    begin, end, origin = tile_entries(index_ptr, row_pointers_ptr, row, first, m, n, count, FLAT, BLOCK_N)
    # Other threads of this program stored what the entries are added to.
    tl.debug_barrier()
    most = tl.max(end - begin, 0)
    for start in range(0, most, ENTRIES):
        place = begin[:, None] + start + tl.arange(0, ENTRIES)[None, :]
        mask = place < end[:, None]
        entry = at + first + (load_entries(index_ptr, place, mask, FLAT) - origin[:, None])
        value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(entry, tl.load(entry, mask=mask, other=0.0).to(tl.float32) + value, mask=mask)


def launch(wide):
    # In three stages fp32 spills registers on sm_90 with triton 3.2.
    return {"num_warps": 8, "num_stages": 2 if wide else 3}


def sltrain_weight(
    B: Tensor, A: Tensor, values: Tensor, index: Tensor, row_pointers: Tensor, *, scale: float
) -> Tensor:
    """See ``lowrank_optim.ops.sltrain.sltrain_weight``; fp64 stays with torch.

    Raises:
        ValueError: factors, values or an index that do not fit each other.
    """
    if B.dtype == torch.float64:
        return eager(B, A, values, index, row_pointers, scale=scale)
    (m, r), n, count = B.shape, A.shape[-1], values.numel()
    check_operand("A", A, (r, n), B.device, (B.dtype,), contiguous=False)
    check_operand("values", values, (count,), B.device, (torch.float32, B.dtype), contiguous=False)
    check_operand("index", index, index.shape, B.device, (torch.uint8, *INDICES))
    index, flat = unpacked(index, row_pointers, (m, n), count)
    W = torch.empty(m, n, dtype=B.dtype, device=B.device)
    sltrain_weight_kernel[(cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N),)](
        B.contiguous(), A.contiguous(), values.contiguous(), index, row_pointers, W, m, n, r, count, scale, FLAT=flat,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, ENTRIES=ENTRIES, **launch(B.dtype == torch.float32),
    )  # fmt: skip
    return W


def aot_cases():
    cases = []
    for dtype, index in SPARSE:
        types = dict.fromkeys(("B_ptr", "A_ptr", "values_ptr", "W_ptr"), f"*{dtype}")
        types |= {"index_ptr": index, "row_pointers_ptr": "*i32", "scale": "fp32"}
        constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "ENTRIES": ENTRIES}
        constants |= {"FLAT": index != "*i16", **launch(dtype == "fp32")}
        cases.append(aot_case(f"sltrain_weight {dtype}, index {index[1:]}", sltrain_weight_kernel, types, constants))
    return cases
