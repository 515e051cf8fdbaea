"""What is particular to DCTAdamW and to columns of a fixed basis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import DCTAdamW
from lowrank_optim.ops.dct_select import dct_select
from lowrank_optim.ops.int8_blocks import dequantize
from lowrank_optim.optim.parts import Group, State
from lowrank_optim.optim.rules.adam import Adam, CorrectedAdam
from lowrank_optim.optim.subspaces.fixed_basis import BASES, basis_rows, coefficients, uses_fft
from tests.conftest import GOLDEN
from tests.reference.columns import cosine_basis, dct_adamw
from tests.temporaries import CountTemporaries

CPU = torch.device("cpu")
SHAPES = {"tall": (14, 9), "wide": (9, 14), "square": (10, 10)}


def step_with(optimizer: DCTAdamW, p: nn.Parameter, grad: Tensor) -> None:
    p.grad = grad
    optimizer.step()


@pytest.mark.parametrize("shape", ["tall", "wide", "square", "vector"])
@pytest.mark.parametrize("method", ["dct_adamw_l1", "dct_adamw_l1_makhoul", "dct_adamw_l2", "dct_adamw_l2_ef"])
@pytest.mark.parametrize("similarity", ["matmul", "fft"])
def test_published_trajectories_are_met(
    method: str, shape: str, similarity: str, golden_config: dict[str, Any], golden_inputs: dict[str, np.ndarray],
    record_reference_error: Callable[..., None],
) -> None:  # fmt: skip
    options = dict(golden_config["methods"][method])
    options["rotate"] = options.pop("rotate_subspace")
    options["basis"] = "dct2" if options.pop("sim_type", "matmul") == "makhoul" else "dct3"
    options["error_feedback"] = "full" if options.pop("use_ef", False) else None
    start, expected = golden_inputs[f"param/{shape}"], np.load(GOLDEN / f"{method}.npz")[f"param/{shape}"]
    p = nn.Parameter(torch.tensor(start))
    other = nn.Parameter(torch.ones(9, 9))  # keeps the optimizer from warning about a lone vector
    optimizer = DCTAdamW([p, other], similarity=similarity, **options)
    ours = []
    for step in range(golden_config["steps"]):
        step_with(optimizer, p, torch.tensor(golden_inputs[f"grad/{shape}"][step]))
        if step + 1 in golden_config["kept_steps"]:
            ours.append(p.detach().numpy().copy())
    assert len(ours) == len(expected) == 6
    record_reference_error("DCTAdamW", ours, expected, start)
    # Measured: fp64 is 3e-6 away from the published fp32, fp32 1e-6.
    assert np.abs(np.stack(ours) - expected).max() <= 5e-6 * np.abs(expected - start).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("feedback", [None, "full"])
@pytest.mark.parametrize(
    ("basis", "ell_norm", "similarity", "rotate"),
    [
        ("dct2", 2, "matmul", True),
        ("dct2", 1, "fft", True),
        ("dct3", 2, "fft", True),
        ("dct3", 1, "matmul", False),
        ("identity", 2, "auto", True),
        ("random", 2, "auto", True),
    ],
)
def test_the_formulas_in_double_precision(
    shape: str, gap: int, feedback: str | None, basis: str, ell_norm: int, similarity: str, rotate: bool
) -> None:
    start = torch.randn(SHAPES[shape], dtype=torch.float64)
    grads = torch.randn(14, *SHAPES[shape], dtype=torch.float64)
    common: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rank": 3}
    k = min(start.shape)
    if basis == "identity":
        columns = np.eye(k)
    elif basis == "random":
        columns = basis_rows(basis, k, torch.float64, CPU).numpy().T
    else:
        columns = cosine_basis(k, basis)
    expected, error = dct_adamw(
        start.numpy(), list(grads.numpy()), basis=columns, gap=gap, ell_norm=ell_norm, rotate=rotate,
        feedback=feedback is not None, **common,
    )  # fmt: skip
    p = nn.Parameter(start.clone())
    optimizer = DCTAdamW(
        [p], update_proj_gap=gap, basis=basis, ell_norm=ell_norm, similarity=similarity, rotate=rotate,
        error_feedback=feedback, **common,
    )  # fmt: skip
    for grad, weight in zip(grads, expected, strict=True):
        step_with(optimizer, p, grad)
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=0, atol=1e-12)
    if feedback:
        # The state has the error in coefficients.
        ours = optimizer.state[p]["error"].numpy() @ columns.T
        np.testing.assert_allclose(ours.T if shape == "wide" else ours, error, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("size", [1, 2, 7, 64, 301])
def test_bases_are_orthogonal_and_shared(basis: str, size: int) -> None:
    rows = basis_rows(basis, size, torch.float64, CPU)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0)
    assert basis_rows(basis, size, torch.float64, CPU) is rows
    narrow = basis_rows(basis, size, torch.float32, CPU)
    assert torch.equal(narrow, rows.float())


def test_a_basis_without_values_is_not_made() -> None:
    meta = torch.device("meta")
    assert basis_rows("random", 10**6, torch.float32, meta).shape == (10**6, 10**6)


def test_every_basis_is_another_one() -> None:
    made = [basis_rows(basis, 7, torch.float64, CPU) for basis in BASES]
    for i, one in enumerate(made):
        assert all(float((one @ other.mT).abs().max(1).values.min()) < 0.99 for other in made[:i])
    # The Q of a Gaussian matrix whose R has a positive diagonal.
    drawn = torch.randn(7, 7, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    triangle = made[BASES.index("random")] @ drawn
    torch.testing.assert_close(triangle.tril(-1), torch.zeros(7, 7, dtype=torch.float64))
    assert bool((triangle.diagonal() > 0).all())


def test_every_size_has_its_basis_and_none_is_in_the_state() -> None:
    shapes = [(30, 12), (12, 30), (9, 40), (12, 12)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = DCTAdamW(params, rank=4)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, (m, n) in zip(params, shapes):
        state = optimizer.state[p]
        assert set(state) == {"step", "seed", "waiting", "left", "side", "rank", "indices", "exp_avg", "exp_avg_sq"}
        assert state["left"] is (m < n)
        assert state["exp_avg"].shape == (max(m, n), 4)
        indices = state["indices"].tolist()
        assert state["indices"].dtype == torch.int64
        assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < min(m, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("shape", [(40, 16), (33, 17), (101, 64), (3, 2)])
@pytest.mark.parametrize("left", [False, True])
def test_scores_by_fft_equal_those_by_product(
    shape: tuple[int, int], left: bool, basis: str, dtype: torch.dtype
) -> None:
    tall = torch.randn(shape[::-1], dtype=dtype).mT if left else torch.randn(shape, dtype=dtype)
    by_fft = coefficients(tall, basis, "fft")
    by_product = coefficients(tall, basis, "matmul")
    atol = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(by_fft, by_product, atol=atol, rtol=0)
    for p in (1, 2):
        assert torch.equal(dct_select(by_fft, 2, ell_norm=p), dct_select(by_product, 2, ell_norm=p))


def test_auto_takes_the_fft_from_the_measured_size_on() -> None:
    assert not uses_fft("dct2", "auto", 256, CPU) and uses_fft("dct2", "auto", 512, CPU)
    assert not uses_fft("random", "auto", 4096, CPU)
    assert uses_fft("dct2", "fft", 8, CPU) and not uses_fft("dct2", "matmul", 4096, CPU)


def test_selection_ties_zeros_and_the_bound_of_the_2_norm() -> None:
    assert dct_select(torch.tensor([[1.0, 2, 2, 1, 2]]), 2, ell_norm=2).tolist() == [1, 2]
    assert dct_select(torch.zeros(3, 5), 3, ell_norm=1).tolist() == [0, 1, 2]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(20, 12, generator=generator) ** 3
        rest = a.clone()
        rest[:, dct_select(a, 5, ell_norm=2)] = 0
        assert rest.square().sum() <= (1 - 5 / 12) * a.square().sum()


def test_the_gather_is_the_product_with_the_rotation() -> None:
    """And new columns start at exactly zero, where the product leaves rounding for Adam to divide by."""
    rows = basis_rows("dct2", 40, torch.float64, CPU)
    old, new = (torch.randperm(40)[:15].sort().values for _ in range(2))
    place = torch.full((40,), -1)
    place[old] = torch.arange(15)
    group = {"state_dtype": "float32", "backend": None}
    moments = {"exp_avg": torch.randn(8, 15, dtype=torch.float64), "exp_avg_sq": torch.rand(8, 15, dtype=torch.float64)}
    gathered, multiplied = ({k: v.clone() for k, v in moments.items()} for _ in range(2))
    Adam().transport(gathered, place[new], group)
    Adam().transport(multiplied, rows[old] @ rows[new].mT, group)
    entered = ~torch.isin(new, old)
    assert 0 < int(entered.sum()) < 15
    for key in moments:
        torch.testing.assert_close(gathered[key], multiplied[key], atol=1e-13, rtol=0)
        assert bool((gathered[key][:, entered] == 0).all())
    assert bool((gathered["exp_avg_sq"] >= 0).all())


class Recorder(CorrectedAdam):
    """Keeps the low-rank gradients."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []

    def direction(self, low: Tensor, state: State, group: Group, *more: Any, **told: Any) -> Tensor:
        self.lows.append(low.clone())
        return super().direction(low, state, group, *more, **told)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("similarity", ["matmul", "fft"])
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("feedback", ["full", "int8"])
def test_error_feedback_conserves_the_gradient(
    shape: tuple[int, int], similarity: str, gap: int, feedback: str
) -> None:
    """What went into the updates and what is left in the error is all that came in; up to rounding, in int8."""
    rounding = 1e-12
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = DCTAdamW([p], rank=3, error_feedback=feedback, similarity=similarity, update_proj_gap=gap)
    recorder = Recorder()
    optimizer.triple = optimizer.triple._replace(rule=recorder)
    rows = basis_rows("dct2", 9, torch.float64, CPU)
    came, used = torch.zeros(14, 9, dtype=torch.float64), torch.zeros(14, 9, dtype=torch.float64)
    for _ in range(9):
        grad = torch.randn(shape, dtype=torch.float64)
        step_with(optimizer, p, grad)
        state = optimizer.state[p]
        came += grad if shape[0] > shape[1] else grad.mT
        used += recorder.lows[-1] @ rows[state["indices"]]
        if feedback == "full":
            error = state["error"]
        else:
            error = dequantize(state["error.codes"], state["error.scale"], torch.float64)
            assert state["error.codes"].dtype == torch.int8 and "error" not in state
            rounding += 0.5 * float(state["error.scale"].max())
        # Orthogonal to what was used in this step.
        assert bool((error[:, state["indices"]] == 0).all())
        torch.testing.assert_close(used @ rows.mT + error, came @ rows.mT, atol=rounding, rtol=0)


def test_a_gradient_in_few_columns_is_plain_adamw() -> None:
    p, q = (nn.Parameter(torch.ones(20, 8)) for _ in range(2))
    ours = DCTAdamW([p], lr=0.1, weight_decay=0.1, rank=3, basis="identity")
    torchs = torch.optim.AdamW([q], lr=0.1, weight_decay=0.1)
    for _ in range(10):
        grad = torch.zeros(20, 8)
        grad[:, [1, 4, 6]] = torch.randn(20, 3)
        p.grad, q.grad = grad, grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(p, q, atol=2e-7, rtol=1e-6)


def test_what_is_not_compressed_is_plain_adamw() -> None:
    shapes = [(12,), (), (4, 3, 2, 2), (5, 4), (1, 8)]
    ours = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizers = [
        DCTAdamW([*ours, nn.Parameter(torch.ones(9, 9))], lr=0.1, weight_decay=0.1, rank=4, error_feedback="full"),
        torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("feedback", ["full", "int8"])
def test_a_bad_gradient_leaves_the_error_as_it_was(feedback: str) -> None:
    """With the identity the low-rank gradient is finite even where an unused column of the gradient is not."""
    p = nn.Parameter(torch.randn(10, 6))
    optimizer = DCTAdamW([p], rank=2, basis="identity", update_proj_gap=100, error_feedback=feedback)
    good = torch.randn(10, 6)
    good[:, :2] *= 100
    step_with(optimizer, p, good)
    keys = [key for key in optimizer.state[p] if key.startswith("error")]
    before = {key: optimizer.state[p][key].clone() for key in keys}
    bad = good.clone()
    bad[3, 5] = float("nan")
    step_with(optimizer, p, bad)
    assert all(torch.equal(optimizer.state[p][key], before[key]) for key in keys)
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("feedback", [None, "full", "int8"])
@pytest.mark.parametrize("shape", [(256, 48), (48, 256)])
@pytest.mark.parametrize("similarity", ["matmul", "fft"])
@pytest.mark.parametrize("gap", [1, 4])
def test_at_most_one_full_size_temporary(
    shape: tuple[int, int], feedback: str | None, similarity: str, gap: int
) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = DCTAdamW([p], rank=4, error_feedback=feedback, similarity=similarity, update_proj_gap=gap)
    step_with(optimizer, p, torch.randn(shape))
    counts = []
    for _ in range(gap):
        p.grad = torch.randn(shape)
        with CountTemporaries(p.numel()) as counter:
            optimizer.step()
        counts.append(len(counter.created))
    # Without error feedback, nothing of that size is needed between two selections.
    needed = 1 if gap == 1 or feedback else 0
    assert counts[:-1] == [needed] * (gap - 1) and counts[-1] == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"basis": "dct4"}, "Invalid basis: 'dct4', expected one of 'dct2', 'dct3', 'identity', 'random'"),
        ({"ell_norm": 3}, "Invalid ell_norm: 3, expected one of 1, 2"),
        ({"similarity": "dft"}, "Invalid similarity: 'dft', expected one of 'auto', 'matmul', 'fft'"),
        ({"similarity": "fft", "basis": "random"}, "Invalid basis: 'random', expected one of 'dct2', 'dct3'"),
        ({"error_feedback": True}, "Invalid error_feedback: True, expected one of None, 'full', 'int8'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCTAdamW([nn.Parameter(torch.ones(8, 8))], rank=2, **kwargs)
