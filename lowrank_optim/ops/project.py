"""The low-rank image of a gradient, summed in fp32 whatever the dtype of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.chunks import NARROW, chunks

# matmul(..., out_dtype=) came with torch 2.8.
_WIDE_PRODUCT = torch.__version__ >= torch.torch_version.TorchVersion("2.8")


def project(grad: Tensor, basis: Tensor) -> Tensor:
    """R = G P, in fp32 or wider: in float16 the image of a finite gradient may overflow.

    Args:
        grad: G (..., rows, d), of any strides.
        basis: P (..., d, rank), in the dtype of G, or wider; then it is not rounded to that of G.

    Returns:
        R (..., rows, rank), without a temporary of G's size.
    """
    if grad.dtype not in NARROW:
        return grad @ basis
    wide = torch.float32
    if grad.device.type == "cuda" and _WIDE_PRODUCT and not torch.compiler.is_compiling():
        product = torch.mm if grad.ndim == 2 else torch.bmm
        if grad.ndim <= 3 and basis.ndim == grad.ndim:
            if basis.dtype == grad.dtype:
                return product(grad, basis, out_dtype=wide)
            # Two numbers of 16 bits are one of 24 or nearly so; matrix units multiply both in a fraction of the time
            # that fp32 takes, and nothing of G's size is converted.
            high = basis.to(grad.dtype)
            rest = (basis - high).to(grad.dtype)
            return product(grad, high, out_dtype=wide).add_(product(grad, rest, out_dtype=wide))
    basis = basis.to(wide)
    if torch.compiler.is_compiling():
        # The compiler fuses the conversion itself.
        return grad.to(wide) @ basis
    low = torch.empty((*grad.shape[:-1], basis.shape[-1]), dtype=wide, device=grad.device)
    for out, part in chunks(low, grad):
        torch.matmul(part.to(wide), basis, out=out) if grad.ndim == 2 else out.copy_(part.to(wide) @ basis)
    return low
