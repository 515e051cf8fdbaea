"""Where nobody looks, kernels read the verdict on a gradient themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.ops import pick
from lowrank_optim.ops.adam8bit_direction import adam8bit_direction
from lowrank_optim.ops.adam_direction import adam_direction
from lowrank_optim.ops.adam_update import adam_update_
from tests.conformance import FP32_AND_SLOW_BF16, noise, quiet, values

BETAS_EPS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
SHAPES = [(2, 7, 9), (5,)]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {}),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "weight_rounding": "compensated"}),
    ("GaLoreAdamW8bit", {}),
    ("FiraAdamW", {}),
    ("FiraAdamW", {"state_dtype": "int8"}),
    ("APOLLOAdamW", {}),
    ("DCTAdamW", {"update_proj_gap": 50}),
    ("FRUGALAdamW", {}),
]


@pytest.mark.parametrize("ok", [[2.0], [torch.nan], [1.0] * 1500 + [torch.inf]], ids=["yes", "no", "one of 1501"])
@pytest.mark.parametrize("measured", [False, True])
def test_a_direction_of_zeros(ok: list[float], measured: bool, device: torch.device) -> None:
    grad, verdict = torch.randn(33, 20, device=device), torch.tensor(ok, device=device)
    results = []
    for operation in (adam_direction, pick(adam_direction, "triton", device)):
        moments = [torch.full((33, 20), 0.5, device=device) for _ in range(2)]
        norms = torch.empty(2, 33, device=device) if measured else None
        direction = operation(grad, *moments, **BETAS_EPS, norms=norms, ok=verdict, dtype=torch.bfloat16)
        assert direction.dtype == torch.bfloat16
        results.append([direction.float(), *moments, *([] if norms is None else [norms])])
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-8, atol=1e-6)
    assert (results[0][1] == 0.45).all() == (verdict.isfinite().logical_not().any())


def test_a_direction_of_zeros_from_codes(device: torch.device) -> None:
    grad, verdict = torch.randn(600, device=device), torch.tensor([torch.nan], device=device)
    results = []
    for operation in (adam8bit_direction, pick(adam8bit_direction, "triton", device)):
        codes = [torch.full((600,), 200, dtype=torch.uint8, device=device) for _ in range(2)]
        scales = [torch.ones(3, device=device) for _ in range(2)]
        direction = operation(
            grad, codes[0], scales[0], codes[1], scales[1], **BETAS_EPS, ok=verdict, dtype=torch.bfloat16
        )
        results.append([direction.float(), *codes, *scales])
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_step_counts_what_is_not_finite_as_zero(backend: str, device: torch.device) -> None:
    grad = torch.randn(40, 30, device=device)
    clean, bad = grad.clone(), grad.clone()
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        clean[i, 3], bad[i, 3] = 0, value
    results = []
    for given in (clean, bad):
        weight, *moments = (torch.ones(40, 30, device=device) for _ in range(3))
        operation = pick(adam_update_, backend, device)
        operation(weight, given, *moments, **BETAS_EPS, alpha=-0.1, decay=0.9)
        results.append([weight, *moments])
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*row, marks=() if row[0] in ("GaLoreAdamW8bit", "APOLLOAdamW") else pytest.mark.slow)
        for row in METHODS
    ],
)
@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
def test_kernels_and_eager_agree_on_a_bad_gradient(
    name: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)
    results: list[list[Tensor]] = []
    for backend in ("eager", "triton"):
        params = [nn.Parameter(draw.to(device, dtype)) for draw in noise(SHAPES, 0)]
        optimizer = quiet(name, params, backend=backend, **{"weight_decay": 0.1, "update_proj_gap": 50, **options})
        for step in range(3):
            for i, (p, draw) in enumerate(zip(params, noise(SHAPES, step + 1))):
                draw.view(-1)[i] = torch.nan if step == 1 else 1.0
                p.grad = draw.to(device, dtype)
            optimizer.step()
        results.append([value.float() for value in values(optimizer, params)])
    coarse = dtype == torch.bfloat16 or options.get("state_dtype", "float32") != "float32" or "8bit" in name
    for theirs, ours in zip(*results):
        assert bool(ours.isfinite().all())
        assert float((theirs - ours).norm() / theirs.norm()) < (2.0**-7 if coarse else 1e-5)
