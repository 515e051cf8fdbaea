"""Newton-Schulz iteration towards the nearest matrix with orthonormal columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.gram import gram

# Of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): steep at zero, where small singular values start.
A, B, C = 3.4445, -4.7750, 2.0315

# How many steps go by in Gram matrices. Each enlarges the rounding of their small eigenvalues by up to A² = 12: in fp32
# three are as close to fp64 as the plain iteration, five 15 times as far.
UNROLLED = 3


def newton_schulz(tall: Tensor, *, steps: int = 5, backend: str | None = None) -> Tensor:
    """U Vᴴ of the singular value decomposition U S Vᴴ, roughly: singular values come to lie in [0.68, 1.2].

        X = tall / ||tall||
        G = Xᴴ X ;  X = a X + X (b G + c G²)           # ``steps`` times

    Directions smaller than about 1/100 of the largest need more than five steps to get there. Zero stays zero.
    With P = a I + b G + c G², X P has the Gram matrix P G P, so that three steps need two tall products only.

    Args:
        tall: (..., rows, columns), columns <= rows for the smaller Gram matrix; computed in bfloat16 on CUDA (complex
            and double excepted), in fp32 or wider elsewhere.
        steps: iterations.
        backend: of the symmetric products G and b G + c G²; see :func:`lowrank_optim.ops.pick`.

    Returns:
        (..., rows, columns) in the dtype of the computation.
    """
    if tall.is_cuda and not tall.is_complex() and tall.dtype != torch.float64:
        x = tall.bfloat16()
    else:
        x = tall.to(torch.promote_types(tall.dtype, torch.float32))
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    # In bfloat16 a Gram matrix is good for one step.
    unrolled = 1 if x.dtype == torch.bfloat16 else UNROLLED
    symmetric = pick(gram, backend, x.device)
    while steps > 0:
        g = symmetric(x)
        product = factor = _factor(g, symmetric)
        for _ in range(min(steps, unrolled) - 1):
            g = factor @ g @ factor
            factor = _factor(g, symmetric)
            product = product @ factor
        x = x @ product
        steps -= unrolled
    return x


def _factor(g: Tensor, symmetric: Callable[..., Tensor]) -> Tensor:
    """a I + b G + c G²."""
    factor = symmetric(g, g, alpha=C, beta=B)
    factor.diagonal(dim1=-2, dim2=-1).add_(A)
    return factor
