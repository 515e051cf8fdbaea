"""Complex weights: what turns the compressed side of a gradient turns the update along.

With a diagonal D of phases, the gradients G D have the bases Dᴴ P, the same low-rank gradients, and the updates U D.
A transpose in the place of an adjoint does not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.optim.alice import TrackedEigen
from lowrank_optim.optim.in_backward import step_in_backward
from tests.optimizers import build

ROWS: list[tuple[str, dict[str, Any]]] = [
    *(("GaLoreAdamW", {"refresh": refresh}) for refresh in ("power", "randomized")),
    # Singular vectors have phases of their own, which moments that are kept do not follow.
    ("GaLoreAdamW", {"refresh": "svd", "update_proj_gap": 100}),
    ("GaLoreAdamW", {"refresh": "svd", "update_proj_gap": 100, "proj_type": "full"}),
    *(("GaLoreAdamW", {"refresh": "svd", "moments": moments}) for moments in ("align", "rotate")),
    ("GaLoreAdafactor", {"beta1": 0.9, "moments": "rotate", "scale_parameter": False}),
    ("FiraAdamW", {}),
    ("FiraAdamW", {"residual": "paper", "moments": "rotate"}),
    ("APOLLOAdamW", {"proj": "svd", "moments": "align"}),
    ("FRUGALAdamW", {"projection": "svd", "reset_moments": False, "moments": "rotate"}),
    ("LDAdamW", {"update_proj_gap": 1}),
    ("LDAdamW", {"update_proj_gap": 1, "proj_method": "svd"}),
    ("LDAdamW", {"update_proj_gap": 1, "error_feedback": False}),
    *(("Alice", {"start": "svd", "beta3": beta3, "update_proj_gap": 2}) for beta3 in (0.0, 0.5)),
    ("GoLoreAdamW", {"refresh": "svd", "update_proj_gap": 100, "random_from": 200}),
    *((name, {}) for name in ("Muon", "SinkGD", "SCALE", "RACS")),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in ROWS]
# Exact in floating point, and no two alike in the rows that matter.
PHASES = torch.tensor([1, 1j, -1, -1j, 1j, -1], dtype=torch.complex128)
ONCE = {"refresh": "svd", "update_proj_gap": 100}
# Those whose subspace does not depend on phases of the other side.
OTHER_SIDE: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", ONCE),
    ("GaLoreAdafactor", {**ONCE, "beta1": 0.9}),
    ("FiraAdamW", ONCE),
    ("FiraAdamW", {**ONCE, "residual": "paper"}),
    *(("APOLLOAdamW", {"moments": moments}) for moments in ("keep", "align", "rotate")),
    ("APOLLOMini", {}),
    ("FRUGALAdamW", {"moments": "align", "reset_moments": False}),
    ("FRUGALAdamW", {"projection": "random", "moments": "rotate", "reset_moments": False}),
    ("FRUGALAdamW", {"projection": "dct", "moments": "rotate", "reset_moments": False}),
    ("DCTAdamW", {}),
    ("DCTAdamW", {"basis": "dct3", "similarity": "matmul", "error_feedback": "full"}),
    ("DCTAdamW", {"basis": "random", "error_feedback": "int8", "ell_norm": 1}),
    ("DCTAdamW", {"basis": "identity"}),
    ("LDAdamW", {"update_proj_gap": 1}),
    ("LDAdamW", {"update_proj_gap": 1, "proj_method": "svd"}),
    ("Trion", {"similarity": "fft"}),
    ("Trion", {"basis": "dct3", "similarity": "fft", "update_proj_gap": 1}),
    ("Alice", {"start": "svd", "leading": 2}),
    ("GoLoreAdamW", {"random_from": 1}),
    *((name, {}) for name in ("Muon", "SinkGD", "SCALE", "RACS")),
]
OTHER_IDS = ["-".join([name, *(f"{k}={v}" for k, v in kwargs.items())]) for name, kwargs in OTHER_SIDE]


def phases(shape: tuple[int, ...]) -> Tensor:
    """D as a tensor that the weight is multiplied with: on the smaller side."""
    return PHASES.unsqueeze(-1) if shape[-2] < shape[-1] else PHASES


def trained(name: str, shape: tuple[int, ...], turn: Tensor, accumulate: int = 0, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight, *grads = torch.randn(17, *shape, generator=generator, dtype=torch.complex128)
    p = nn.Parameter(weight * turn)
    optimizer = build(name, [p], **{"rank": 3, "lr": 1e-2, **kwargs})
    handle = step_in_backward(optimizer, accumulate=accumulate) if accumulate else None
    for grad in grads:
        if handle is None:
            p.grad = grad * turn
            optimizer.step()
        else:
            with handle.micro_batch():
                ((grad * turn).conj() * p).real.sum().backward()
    return p.detach()


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (2, 8, 6), (2, 6, 8)], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), ROWS, ids=IDS)
def test_phases_of_the_compressed_side_turn_the_update_along(
    name: str, kwargs: dict[str, Any], shape: tuple[int, ...]
) -> None:
    turn = phases(shape)
    plain = trained(name, shape, torch.ones_like(turn), **kwargs)
    assert torch.isfinite(torch.view_as_real(plain)).all()
    torch.testing.assert_close(trained(name, shape, turn, **kwargs), plain * turn, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*compresses no parameter")
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (2, 8, 6), (2, 6, 8), (5,)], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), OTHER_SIDE, ids=OTHER_IDS)
def test_phases_of_the_other_side_turn_the_update_along(
    name: str, kwargs: dict[str, Any], shape: tuple[int, ...]
) -> None:
    long = torch.cat((PHASES, PHASES[1:3]))
    turn = PHASES[:5] if len(shape) == 1 else long if shape[-2] < shape[-1] else long.unsqueeze(-1)
    plain = trained(name, shape, torch.ones_like(turn), **kwargs)
    assert torch.isfinite(torch.view_as_real(plain)).all()
    torch.testing.assert_close(trained(name, shape, turn, **kwargs), plain * turn, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("refresh", ["power", "randomized"])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)], ids=str)
def test_phases_turn_an_update_of_summed_micro_batches_along(refresh: str, shape: tuple[int, ...]) -> None:
    turn = phases(shape)
    options = {"accumulate": 2, "refresh": refresh, "moments": "rotate"}
    plain = trained("GaLoreAdamW", shape, torch.ones_like(turn), **options)
    found = trained("GaLoreAdamW", shape, turn, **options)
    if refresh == "power":
        torch.testing.assert_close(found, plain * turn, rtol=1e-7, atol=1e-9)
    assert torch.isfinite(torch.view_as_real(found)).all()


@pytest.mark.parametrize("leading", [1, 2])
def test_what_is_drawn_stands_at_right_angles_to_complex_vectors(leading: int) -> None:
    subspace, state = TrackedEigen(), {"seed": 1, "step": 2}
    vectors = torch.linalg.qr(torch.randn(9, 4, dtype=torch.complex128)).Q
    basis = subspace._completed(vectors, leading, state, {"capturable": False, "backend": None})
    torch.testing.assert_close(basis[:, :leading], vectors[:, :leading])
    across = vectors.mH @ basis[:, leading:]
    torch.testing.assert_close(across, torch.zeros_like(across))
