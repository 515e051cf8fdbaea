"""What is particular to Trion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lowrank_optim import Trion, low_rank_groups
from lowrank_optim.optim.lifts.momentum import update_scale
from lowrank_optim.optim.subspaces.fixed_basis import basis_rows
from tests.reference.columns import cosine_basis, trion
from tests.temporaries import CountTemporaries

SHAPES = {"tall": (14, 9), "wide": (9, 14), "square": (10, 10)}


def step_with(optimizer: Trion, p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("basis", "ell_norm", "similarity", "scaling", "gap"),
    [
        ("dct2", 2, "matmul", "kj", 1),
        ("dct2", 1, "fft", "dion", 1),
        ("dct3", 1, "fft", "kimi", 3),
        ("identity", 2, "auto", "none", 1),
    ],
)
def test_the_formulas_in_double_precision(
    shape: str, basis: str, ell_norm: int, similarity: str, scaling: str, gap: int
) -> None:
    m, n = SHAPES[shape]
    start, grads = torch.randn(m, n, dtype=torch.float64), torch.randn(14, m, n, dtype=torch.float64)
    scale = {
        "kj": math.sqrt(max(1, m / n)),
        "dion": math.sqrt(m / n),
        "kimi": 0.2 * math.sqrt(max(m, n)),
        "none": 1.0,
    }[scaling]
    k = min(m, n)
    common: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "rank": 3, "ns_steps": 4}
    expected = trion(
        start.numpy(), list(grads.numpy()), basis=np.eye(k) if basis == "identity" else cosine_basis(k, basis),
        gap=gap, ell_norm=ell_norm, scale=scale, **common,
    )  # fmt: skip
    p = nn.Parameter(start.clone())
    optimizer = Trion(
        [p], basis=basis, ell_norm=ell_norm, similarity=similarity, scaling=scaling, update_proj_gap=gap, **common
    )
    for grad, weight in zip(grads, expected, strict=True):
        step_with(optimizer, p, grad)
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=0, atol=1e-12)


def test_only_what_is_used_of_the_momentum_decays() -> None:
    p = nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    optimizer = Trion([p], rank=3, momentum=0.75)
    grad = torch.randn(12, 8, dtype=torch.float64)
    step_with(optimizer, p, grad)
    state = optimizer.state[p]
    rows = basis_rows("dct2", 8, torch.float64, torch.device("cpu"))
    expected = grad @ rows.mT
    expected[:, state["indices"]] *= 0.75
    torch.testing.assert_close(state["momentum"], expected, atol=1e-13, rtol=0)
    assert set(state) == {"step", "seed", "waiting", "left", "side", "rank", "indices", "momentum"}


@pytest.mark.parametrize("scaling", ["kj", "dion", "kimi", "none"])
@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_the_update_has_rank_r_and_singular_values_near_the_scale(shape: tuple[int, int], scaling: str) -> None:
    p = nn.Parameter(torch.zeros(shape))
    step_with(Trion([p], lr=1.0, rank=5, scaling=scaling), p, torch.randn(shape))
    values = torch.linalg.svdvals(p.detach()) / update_scale(*shape, scaling)
    assert bool((values[:5] > 0.66).all()) and bool((values[:5] < 1.21).all()) and bool((values[5:] < 1e-5).all())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attn = nn.Linear(12, 12)
        self.mlp = nn.Linear(12, 30, bias=False)
        self.head = nn.Linear(30, 20, bias=False)


@pytest.mark.parametrize("given", ["named", "groups"])
def test_what_is_no_hidden_matrix_is_torchs_adamw_at_its_own_rate(given: str) -> None:
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    params: Any = ours.named_parameters() if given == "named" else low_rank_groups(ours, rank=4)
    optimizer = Trion(params, lr=0.02, rank=4, adamw_lr=3e-3, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    names = ["embed.weight", "attn.bias", "head.weight"]
    assert sorted(optimizer.param_groups[1]["param_names"]) == sorted(names)
    reference = torch.optim.AdamW(
        [theirs.get_parameter(name) for name in names], lr=3e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1
    )
    schedules = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, reference)]
    for _ in range(4):
        for name, p in ours.named_parameters():
            p.grad = torch.randn_like(p)
            theirs.get_parameter(name).grad = p.grad.clone()
        for o in (optimizer, reference):
            o.step()
        for schedule in schedules:
            schedule.step()
    for name in names:
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_groups_stay_as_they_were_given_and_a_group_that_names_its_rate_keeps_it() -> None:
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(shape)) for shape in [(8,), (9, 8), (3, 9)]]

    optimizer = Trion(params(), rank=4)
    optimizer.add_param_group({"params": params(), "lr": 0.5})
    optimizer.add_param_group({"params": params()[:1], "adamw_lr": 0.25})
    optimizer.add_param_group({"params": params(), "lr": 0.5, "adamw_lr": 0.125})
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3, 1, 3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5, 0.01, 0.5]
    shares = [group["adamw_share"] for group in optimizer.param_groups]
    assert shares == pytest.approx([0.03, 1.0, 25.0, 0.25])


def test_a_schedule_with_one_factor_a_group_drives_both_rates() -> None:
    matrix, vector = nn.Parameter(torch.zeros(9, 8)), nn.Parameter(torch.zeros(8))
    optimizer = Trion([matrix, vector], rank=4, adamw_lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step])
    moved = []
    for _ in range(2):
        before = vector.detach().clone()
        matrix.grad, vector.grad = torch.randn(9, 8), torch.ones(8)
        optimizer.step()
        schedule.step()
        moved.append(float((before - vector.detach()).abs().max()))
    assert moved == pytest.approx([1e-3, 5e-4], rel=1e-4)


@pytest.mark.parametrize("shape", [(256, 48), (48, 256)])
@pytest.mark.parametrize("similarity", ["matmul", "fft"])
def test_at_most_one_full_size_temporary(shape: tuple[int, int], similarity: str) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = Trion([p], rank=4, similarity=similarity)
    step_with(optimizer, p, torch.randn(shape))
    p.grad = torch.randn(shape)
    with CountTemporaries(p.numel()) as counter:
        optimizer.step()
    assert len(counter.created) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 1.0}, r"Invalid momentum: 1.0, expected a number in \[0, 1\)"),
        ({"ns_steps": 0}, "Invalid ns_steps: 0, expected a positive int"),
        ({"scaling": "muon"}, "Invalid scaling: 'muon', expected one of 'kj', 'dion', 'kimi', 'none'"),
        ({"adamw_lr": -1.0}, "Invalid adamw_lr: -1.0"),
        ({"basis": "svd"}, "Invalid basis: 'svd'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trion([nn.Parameter(torch.ones(8, 8))], rank=2, **kwargs)
