"""What kernels and wrappers share, checks of operands, and where the stored entries of a tile of a sparse matrix stand.

For the packings see ``lowrank_optim.ops.support``. Entries are sorted by position. A tile finds its share of each of
its rows by bisection, so that neither atomics nor an order of their own are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_kernels.rounding import INTERPRETED
from lowrank_optim.ops.chunks import as_batch
from lowrank_optim.ops.support import positions

INDICES = (torch.int32, torch.int64)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton's takes ten times as long, and a launch takes it several times."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least one that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def batch_strides(name: str, tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a batch of matrices (..., rows, columns) as if its leading axes were one; zeros where there is none.

    Raises:
        ValueError: leading axes that have no common stride.
    """
    if tensor is None:
        return 0, 0, 0
    # A view of a single matrix would take as long as a small product.
    return (0, *tensor.stride()) if tensor.ndim == 2 else as_batch(name, tensor).stride()


def check_operand(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATING,
    *,
    contiguous: bool = True,
) -> None:
    """A kernel takes its sizes from one operand and would read past the end of another; an absent one is right.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout.
    """
    if tensor is None or (
        tensor.shape == shape
        and tensor.dtype in dtypes
        and tensor.device == device
        and (not contiguous or tensor.is_contiguous())
    ):
        return
    layout = "" if tensor.is_contiguous() or not contiguous else f", strides {tensor.stride()}"
    found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}{layout}"
    wanted = " or ".join(map(str, dtypes))
    raise ValueError(
        f"Invalid {name}: {found}, expected {'contiguous ' if layout else ''}{tuple(shape)} {wanted} on {device}"
    )


def check_scales(
    row_scale: Tensor | None, column_scale: Tensor | None, shape: Sequence[int], device: torch.device
) -> None:
    """Scales of a gradient of this shape: a number a row or one for all rows, and a number a column.

    Raises:
        ValueError: as :func:`check_operand`.
    """
    *batch, m, n = shape
    rows = 1 if row_scale is not None and row_scale.shape[-2:] == (1, 1) else m
    check_operand("row_scale", row_scale, (*batch, rows, 1), device, contiguous=False)
    check_operand("column_scale", column_scale, (*batch, 1, n), device, contiguous=False)


def check_scalar(name: str, value: object, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """A number, or a tensor of one element that a kernel reads itself.

    Raises:
        ValueError: a tensor of more elements, of another dtype or on another device.
    """
    # A device without an index is the current one.
    if isinstance(value, Tensor) and not (
        value.numel() == 1
        and value.device.type == device.type
        and device.index in (None, value.device.index)
        and value.dtype in dtypes
    ):
        found = f"{tuple(value.shape)} {value.dtype} on {value.device}"
        raise ValueError(
            f"Invalid {name}: {found}, expected a number or one element {' or '.join(map(str, dtypes))} on {device}"
        )


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A number that a kernel was given as it is, or as a pointer to it."""
    if INTERPRETED:
        # Which hands floats on as they are.
        value = tl.full((), value, dtype) if isinstance(value, float) else value
    if value.dtype.is_ptr():
        value = tl.load(value)
    return value.to(dtype)


@triton.jit
def all_finite(values_ptr, count):
    """Whether ``count`` fp32 values are neither NaN nor infinite."""
    bad = tl.zeros((1024,), dtype=tl.int32)
    for first in range(0, count, 1024):
        at = first + tl.arange(0, 1024)
        values = tl.load(values_ptr + at, mask=at < count, other=0.0)
        bad = tl.where(tl.abs(values) < float("inf"), bad, 1)
    return tl.max(bad, 0) == 0


@triton.jit
def load_entries(index_ptr, places, mask, FLAT: tl.constexpr):
    entries = tl.load(index_ptr + places, mask=mask, other=0)
    if FLAT:
        return entries.to(tl.int64)
    # Columns are stored as the bytes of uint16.
    return entries.to(tl.int64) & 0xFFFF


@triton.jit
def lower_bound(index_ptr, begin, end, key, FLAT: tl.constexpr):
    # The first place in [begin, end) whose entry is not below key, a row a lane.
    span = tl.max(end - begin, 0)
    while span > 0:
        middle = begin + (end - begin) // 2
        searching = begin < end
        less = load_entries(index_ptr, middle, searching, FLAT) < key
        begin = tl.where(searching & less, middle + 1, begin)
        end = tl.where(searching & (less == 0), middle, end)
        span = span // 2
    return begin


@triton.jit
def tile_entries(
    index_ptr, row_pointers_ptr, row, first_column, m, n, count, FLAT: tl.constexpr, BLOCK_N: tl.constexpr
):
    # For rows (BLOCK_M,) and columns from first_column: the places [begin, end), and what to subtract from an entry
    # for its column within the tile.
    inside = row < m
    if FLAT:
        origin = row.to(tl.int64) * n
        begin = tl.zeros_like(origin)
        end = tl.where(inside, begin + count, begin)
    else:
        origin = tl.zeros_like(row).to(tl.int64)
        begin = tl.load(row_pointers_ptr + row, mask=inside, other=0).to(tl.int64)
        end = tl.load(row_pointers_ptr + row + 1, mask=inside, other=0).to(tl.int64)
    start = origin + first_column
    stop = origin + tl.minimum(first_column + BLOCK_N, n)
    begin = lower_bound(index_ptr, begin, end, start, FLAT)
    end = lower_bound(index_ptr, begin, end, stop, FLAT)
    return begin, end, start


def unpacked(index: Tensor, row_pointers: Tensor, shape: tuple[int, int], count: int) -> tuple[Tensor, bool]:
    """The index as the kernels read it, and whether it holds positions rather than columns.

    Raises:
        ValueError: an index or row pointers that are not those of ``count`` entries of a matrix of this shape.
    """
    rows, columns = shape
    if index.dtype == torch.uint8 and row_pointers.numel():
        check_operand("index", index, (2 * count,), index.device, (torch.uint8,))
        check_operand("row_pointers", row_pointers, (rows + 1,), index.device, INDICES)
        return index.view(torch.int16), False
    if index.dtype == torch.uint8:
        check_operand("index", index, (-(-rows * columns // 8),), index.device, (torch.uint8,))
    else:
        check_operand("index", index, (count,), index.device, INDICES)
    return positions(index, row_pointers, shape, count), True
