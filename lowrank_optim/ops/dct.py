"""Orthonormal discrete cosine transforms along the last axis: the matrix, and the same through one FFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II matrix C (size, size) in fp64: row f is the basis vector of frequency f.

        C[f, j] = sqrt(2 / size) cos(pi f (2j + 1) / (2 size)), row 0 divided by sqrt(2)

    ``x @ C.T`` is the DCT of type 2 of a row, ``x @ C`` that of type 3, its inverse. The phase is reduced as an
    integer: taken in fp32, it is off by 1e-3 for a size of 4096.
    """
    f = torch.arange(size, device="cpu")
    table = torch.cos(torch.arange(4 * size, dtype=torch.float64, device="cpu") * (math.pi / (2 * size)))
    matrix = table[torch.outer(f, 2 * f + 1) % (4 * size)].mul_(math.sqrt(2 / size))
    matrix[0] *= math.sqrt(0.5)
    return matrix


# A dict, because torch.compile reads one; it would trace through functools.cache and make a plan in every step.
PLANS: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def _plan(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Makhoul's order of the input (even, then odd descending), its inverse, and the turned, scaled roots of unity."""
    key = (size, dtype, device)
    if key not in PLANS:
        place = torch.arange(size, device="cpu")
        order = torch.cat([place[::2], place[1::2].flip(0)])
        phase = torch.arange(size // 2 + 1, dtype=torch.float64, device="cpu") * (-math.pi / (2 * size))
        roots = torch.polar(torch.full_like(phase, math.sqrt(2 / size)), phase)
        roots[0] = math.sqrt(1 / size)
        PLANS[key] = order.to(device), order.argsort().to(device), roots.to(device=device, dtype=dtype.to_complex())
    return PLANS[key]


def add_dct2_(out: Tensor, x: Tensor) -> None:
    """out += ``x @ dct_matrix(n).T`` along the last axis (length n), by a real FFT of length n.

    Args:
        out: shape of ``x``, fp32 or wider, real or complex; the transform is computed in its dtype.
        x: real where ``out`` is.

    Source: Makhoul 1980 (doi:10.1109/TASSP.1980.1163351).
    """
    if out.is_complex():
        add_dct2_(out.real, x.real)
        add_dct2_(out.imag, x.imag)
        return
    n = x.shape[-1]
    half = n // 2 + 1
    order, _, roots = _plan(n, out.dtype, out.device)
    z = torch.fft.rfft(x.to(out.dtype).index_select(-1, order)).mul_(roots)
    out[..., :half].add_(z.real)
    # Of the upper half only the imaginary parts are new: y[n - f] = -Im z[f].
    out[..., half:].sub_(z.imag[..., 1 : (n + 1) // 2].flip(-1))


def add_dct3_(out: Tensor, y: Tensor) -> None:
    """out += ``y @ dct_matrix(n)`` along the last axis, the inverse of :func:`add_dct2_`; arguments as there."""
    if out.is_complex():
        add_dct3_(out.real, y.real)
        add_dct3_(out.imag, y.imag)
        return
    n = y.shape[-1]
    y = y.to(out.dtype)
    _, inverse, roots = _plan(n, out.dtype, out.device)
    half = n // 2 + 1
    # y[n - f] for f = 0 .. n/2; that of f = 0 lies beyond the end and counts as zero.
    mirrored = torch.nn.functional.pad(y[..., n - half + 1 :].flip(-1), (1, 0))
    z = torch.complex(y[..., :half].contiguous(), mirrored.neg_()).div_(roots)
    out.add_(torch.fft.irfft(z, n=n).index_select(-1, inverse))
