"""Conditions that only a GPU, a compiler or a rare setting meets, each asked directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import DCTAdamW, FiraAdamW, FRUGALAdamW, GaLoreAdamW, QGaLoreAdamW8bit
from lowrank_optim.ops import lowrank_update
from lowrank_optim.ops.chunks import chunks, row_blocks
from lowrank_optim.ops.fused_adam import fused_adam_fits
from lowrank_optim.ops.int8_weight import row_slices
from lowrank_optim.ops.limited_scale import limited_scale
from lowrank_optim.ops.newton_schulz import newton_schulz
from lowrank_optim.ops.project import project
from lowrank_optim.optim import plans, weight_storage
from lowrank_optim.optim.engine import without_autocast
from lowrank_optim.optim.finite import host_looks, is_finite, verdict, zero_unless
from lowrank_optim.optim.parts import Which
from lowrank_optim.optim.rules import adam
from lowrank_optim.optim.schedule import refresh_due
from lowrank_optim.optim.subspaces import singular
from lowrank_optim.optim.subspaces.fixed_basis import uses_fft
from lowrank_optim.optim.subspaces.random import overlap_of
from lowrank_optim.optim.subspaces.singular import TopSingular
from lowrank_optim.optim.validation import check_range

GPU = torch.device("cuda")


class OnGPU(Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    is_cuda = True
    device = GPU


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGPU)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


# ---- devices ----


@pytest.mark.parametrize("captures", [False, True])
def test_only_a_graph_under_capture_never_refreshes(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    group = {"update_proj_gap": 5, "stagger": False}
    for step, due in [(0, True), (torch.zeros(()), True), (on_gpu(torch.zeros(())), not captures)]:
        assert refresh_due({"step": step, "waiting": 0}, group, 0) is due


@pytest.mark.usefixtures("compiling")
def test_a_compiler_is_asked_no_value_of_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.rand(2, 6) + 1, torch.rand(6, 1) + 1, torch.tensor(1.0)
    options = {"gamma": 1.01, "inner": 0.25, "low": torch.randn(6, 3), "back": 1.0}
    expected = limited_scale(*given, **options, direction=torch.ones(6, 3))

    def asked(tensor: Tensor) -> bool:
        raise AssertionError("a value is read")

    for name in ("__bool__", "__float__", "item"):
        monkeypatch.setattr(Tensor, name, asked)
    found = limited_scale(*given, **options, direction=torch.ones(6, 3))
    monkeypatch.undo()
    for a, b in zip(found, expected):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_host_looks_on_the_cpu_alone() -> None:
    assert host_looks(torch.device("cpu")) and not host_looks(GPU)
    assert verdict(torch.ones(3)) is True and verdict(torch.full((3,), torch.inf)) is False
    # A sum in 16 bits would overflow.
    assert verdict(torch.full((9, 9), 60000.0, dtype=torch.float16)) is True
    # Their squares overflow.
    assert verdict(torch.full((9, 9), 1e25)) is True
    # And these are beyond fp32.
    assert verdict(torch.full((3,), 1e200, dtype=torch.float64)) is True
    assert verdict(torch.full((3,), 1e200j, dtype=torch.complex128)) is True
    assert verdict(torch.tensor([1.0, complex(0, torch.nan)])) is False


def test_the_host_does_not_look_while_a_compiler_does(compiling: None) -> None:
    assert not host_looks(torch.device("cpu"))
    found = verdict(torch.tensor([1.0, torch.nan]))
    assert isinstance(found, Tensor) and not is_finite(found)
    assert zero_unless(found, torch.tensor([1.0, torch.nan])).tolist() == [0, 0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_autocast_reaches_the_step(device: str) -> None:
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, before)


def test_a_number_on_a_gpu_is_not_read() -> None:
    check_range("lr", on_gpu(torch.tensor(-1.0)), low=0.0)
    with pytest.raises(ValueError, match=r"Invalid lr: -1\.0"):
        check_range("lr", torch.tensor(-1.0), low=0.0)


def test_newton_schulz_is_bf16_on_a_gpu_where_the_input_allows() -> None:
    for dtype, computed in [
        (torch.float32, torch.bfloat16), (torch.float64, torch.float64), (torch.complex64, torch.complex64),
    ]:  # fmt: skip
        tall = torch.randn(40, 8, dtype=dtype)
        assert newton_schulz(on_gpu(tall), backend="eager").dtype == computed
        assert newton_schulz(tall).dtype == dtype


def test_in_bf16_every_step_of_newton_schulz_has_a_gram_matrix_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []

    def counted(eager: Any, backend: Any, device: Any) -> Any:
        def gram(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not args:
                found.append(x.dtype)
            return eager(x, *args, **kwargs)

        return gram

    monkeypatch.setattr("lowrank_optim.ops.newton_schulz.pick", counted)
    newton_schulz(on_gpu(torch.randn(40, 8)), steps=5)
    assert found == [torch.bfloat16] * 5
    found.clear()
    newton_schulz(torch.randn(40, 8), steps=5)
    assert found == [torch.float32] * 2


def test_parts_are_eighths_where_every_part_is_a_launch() -> None:
    assert [len(part) for (part,) in chunks(torch.empty(64, 3, device="meta"))] == [8] * 8
    assert len(list(chunks(torch.empty(64, 3)))) == 2
    weight = torch.empty(1, 64, 3, device="meta")
    assert [rows.stop - rows.start for _, rows in row_blocks(weight)] == [8] * 8
    assert len(list(row_blocks(torch.empty(1, 64, 3)))) == 2


def test_a_compiler_gets_one_part(compiling: None) -> None:
    assert list(row_blocks(torch.empty(3, 64, 3))) == [(slice(0, 3), slice(0, 64))]
    assert row_slices(4096, 4096) == [slice(0, 4096)]


def test_the_fft_begins_later_where_it_was_not_measured() -> None:
    for size, fft in [(512, False), (5999, False), (6000, True)]:
        assert uses_fft("dct2", "auto", size, GPU) is fft
    assert not uses_fft("identity", "auto", 4096, GPU)


@pytest.mark.parametrize(
    ("shape", "wide", "name"),
    [((6, 5), True, "mm"), ((2, 6, 5), True, "bmm"), ((2, 2, 6, 5), True, None), ((6, 5), False, None)],
)
def test_a_gpu_sums_a_projection_in_fp32_itself(
    shape: tuple[int, ...], wide: bool, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def product(of: str) -> Any:
        def multiply(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
            called.append(of)
            return a.to(out_dtype) @ b.to(out_dtype)

        return multiply

    for of in ("mm", "bmm"):
        monkeypatch.setattr(torch, of, product(of))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **{**kwargs, "device": "cpu"}))
    monkeypatch.setattr("lowrank_optim.ops.project._WIDE_PRODUCT", wide)
    grad, basis = torch.randn(shape).bfloat16(), torch.randn(*shape[:-2], 5, 2).bfloat16()
    torch.testing.assert_close(
        project(on_gpu(grad), basis).as_subclass(Tensor), grad.float() @ basis.float(), rtol=1e-5, atol=1e-5
    )
    assert called == ([] if name is None else [name])
    called.clear()
    project(grad, basis)
    assert not called


def test_a_compiler_gets_a_projection_as_one_product(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.ops.project.chunks", None)
    monkeypatch.setattr("lowrank_optim.ops.project._WIDE_PRODUCT", True)
    grad, basis = torch.randn(6, 5).bfloat16(), torch.randn(5, 2).bfloat16()
    for seen in (grad, on_gpu(grad)):
        assert torch.equal(project(seen, basis).as_subclass(Tensor), grad.float() @ basis.float())


@pytest.mark.parametrize(
    ("device", "with_grad", "dtype"),
    [
        ("cpu", False, torch.float32),
        ("cpu", True, torch.float32),
        ("meta", False, torch.bfloat16),
        ("meta", True, torch.float32),
    ],
)
def test_a_narrow_weight_moves_in_its_own_dtype_where_a_product_of_it_is_fast(
    device: str, with_grad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    monkeypatch.setattr(lowrank_update, "move_", lambda value, *args: seen.add(value.dtype))
    weight, left, right, grad = (
        torch.zeros(shape, dtype=torch.bfloat16, device=device)
        for shape in [(2, 6, 5), (2, 6, 2), (2, 5, 2), (2, 6, 5)]
    )
    scales = {"grad": grad, "row_scale": torch.ones(2, 6, 1, device=device)} if with_grad else {}
    lowrank_update.lowrank_update_(weight, left, right, **scales)
    assert seen == {dtype}


def test_numbers_on_other_devices_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.tensor(2.0), torch.empty((), device="meta")
    assert lowrank_update._number(here) == 2 and not isinstance(lowrank_update._number(here), Tensor)
    assert lowrank_update._number(there) is there and lowrank_update._number(3.0) == 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert lowrank_update._number(here) is here


def test_a_scale_of_zero_masks_the_gradient_where_nobody_looks(compiling: None) -> None:
    weight, grad = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, torch.inf]])
    scale = torch.tensor([[2.0], [0.0], [0.0]])
    lowrank_update.lowrank_update_(weight, None, None, grad=grad, row_scale=scale)
    assert weight.tolist() == [[3, 5], [1, 1], [1, 1]]


def test_what_keeps_the_eager_update(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = weight_storage._keeps_eager
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    try:
        for tf32 in (False, True):
            settings.allow_tf32 = tf32
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64):
                param = torch.empty(1, dtype=dtype)
                unknown = dtype in (torch.float64, torch.complex64)
                assert keeps(param, "triton") is unknown
                assert keeps(param, None) is (unknown or (dtype == torch.float32 and not tf32))
    finally:
        settings.allow_tf32 = before
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert keeps(torch.empty(1), "triton")


def test_what_the_fused_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(4, 3)
    assert fused_adam_fits(one, one.clone()) and fused_adam_fits(one.double(), one.double())
    for other in (torch.zeros(3, 4), one.double(), one.to("meta"), torch.zeros(3, 4).mT):
        assert not fused_adam_fits(one, other)
    assert not fused_adam_fits(one.half(), one.half()) and not fused_adam_fits(one.to("meta"), one.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused_adam_fits(one, one)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("capturable", [False, True])
def test_torchs_kernel_is_taken_where_nothing_else_is_asked_for(
    backend: str | None, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[int, ...]] = []
    fused = adam.fused_adam_

    def counted(target: Tensor, *args: Any, **kwargs: Any) -> None:
        called.append(tuple(target.shape))
        fused(target, *args, **kwargs)

    monkeypatch.setattr(adam, "fused_adam_", counted)
    params = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5))]
    # FRUGAL's eps depends on the step, which is a tensor where that is captured.
    optimizer = FRUGALAdamW(params, rank=2, backend=backend, capturable=capturable)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert called == ([(8, 2), (5,)] if backend is None and not capturable else [])


def test_what_adam_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = adam.Adam()
    monkeypatch.setattr(adam, "pick", lambda eager, backend, device: lambda *args: None)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        low = torch.zeros(2, 3, dtype=dtype)
        group = {"backend": None, "state_dtype": "float32"}
        has = [
            rule._kernel(adam.adam_direction, low, {}, {**group, **other}) is not None
            for other in ({}, {"backend": "triton"}, {"state_dtype": "int4"})
        ]
        assert has == [dtype in (torch.float32, torch.bfloat16), True, False]


# ---- plans ----


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5))]
    optimizer = GaLoreAdamW(params, rank=2)
    made: list[Tensor] = []
    view_of = plans.view_of
    monkeypatch.setattr(plans, "view_of", lambda p, *args: (made.append(p), view_of(p, *args))[1])
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    assert len(made) == 2
    optimizer.param_groups[0]["scale"] = 0.5
    optimizer.step()
    assert len(made) == 4


def test_a_compiler_that_meets_a_new_parameter_plans_it(compiling: None) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    plan = optimizer.plan_of(p, optimizer.param_groups[0])
    optimizer.param_groups[0]["scale"] = 0.5
    # From then on a step does not compare it.
    assert optimizer._plan(p, optimizer.param_groups[0], None) is plan and plan.state is optimizer.state[p]


def test_an_option_that_changes_is_checked_at_the_next_step() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["scale"] = -1.0
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Invalid scale: -1\.0"):
            optimizer.step()
    assert torch.equal(p, before)


def test_what_is_done_with_a_parameter_is_explained() -> None:
    shapes = [(8, 6), (3, 8, 6), (8, 6, 3, 3), (8, 2), (5,)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    whole = nn.Parameter(torch.randn(8, 6))
    groups = [{"params": params, "rank": 2}, {"params": [whole], "rank": None}]
    reasons = [
        "its smaller side exceeds 2",
        "a stack of 3 matrices whose smaller side exceeds 2",
        "a convolution, compressed along its long axes",
        "its smaller side does not exceed 2",
        "fewer than two dimensions",
        "its group has no rank",
    ]
    optimizer = GaLoreAdamW(groups)
    assert [row.reason for row in optimizer.explain()] == reasons
    assert [row.method for row in optimizer.explain()] == ["rank 2"] * 3 + ["full-rank"] * 3
    assert [row.name for row in optimizer.explain()] == [f"param.{i}" for i in range(6)]
    reasons[2] = "a convolution, compressed as a matrix 8 x 54"
    assert [row.reason for row in FiraAdamW(groups).explain()] == reasons
    optimizer.state[params[0]]["rank"] = 4
    assert optimizer.explain()[0][2:] == ("rank 4", "its state has rank 4; the next step rebuilds it with rank 2")
    named = GaLoreAdamW([("a", params[0]), ("b", params[1])], rank=2)
    assert [row.name for row in named.explain()] == ["a", "b"]


def test_a_compiled_step_runs_as_it_is_where_it_makes_a_state_or_a_basis() -> None:
    matrix, vector, idle = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    optimizer = GaLoreAdamW([matrix, vector, idle], rank=2, update_proj_gap=3)
    found = []
    for _ in range(8):
        for p in (matrix, vector):
            p.grad = torch.randn_like(p)
        found.append(optimizer._works_on_the_host())
        optimizer.step()
    assert found == [True, False, False, True, False, False, True, False]
    idle.grad = torch.randn_like(idle)
    assert optimizer._works_on_the_host()


def test_a_step_asks_whether_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    disabled: list[Any] = []
    monkeypatch.setattr(torch.compiler, "disable", lambda step: (disabled.append(step), step)[1])
    for compiles, works, expected in [(False, True, 0), (True, False, 0), (True, True, 1)]:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiles=compiles: compiles)
        monkeypatch.setattr(optimizer, "_works_on_the_host", lambda works=works: works)
        optimizer.step()
        assert len(disabled) == expected


# ---- rare states ----


@pytest.mark.filterwarnings("ignore:.*non-finite gradient")
@pytest.mark.parametrize("basis", ["dct2", "identity"])
def test_a_step_from_the_low_rank_gradient_alone_is_the_step(basis: str) -> None:
    params = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = DCTAdamW(params, rank=2, basis=basis, update_proj_gap=3)
    for bad in (False, False, True):
        grad = torch.full((8, 6), torch.nan) if bad else torch.randn(8, 6)
        if optimizer.state[params[0]]:
            plan = optimizer.plan_of(params[1], optimizer.param_groups[0])
            assert plan.parts.subspace is not None
            low = plan.parts.subspace.project(grad, plan.state, optimizer.param_groups[0])
            optimizer.step_low(params[1], low, optimizer.param_groups[0])
        else:
            params[1].grad = grad
        params[0].grad = grad
        optimizer.step()
        params[1].grad = None
        torch.testing.assert_close(params[0], params[1], rtol=0, atol=1e-6)
    assert params[0].ne(1).any() and params[0].isfinite().all()


@pytest.mark.parametrize("two_phase", [False, True])
def test_a_refresh_under_way_is_declared_where_there_can_be_one(two_phase: bool) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    for refresh, can in [("power", True), ("svd", False)]:
        optimizer = GaLoreAdamW([p], rank=2, refresh=refresh)
        optimizer.param_groups[0]["two_phase"] = two_phase
        assert ("pending" in optimizer.slots_of(p, optimizer.param_groups[0])) is (two_phase and can)
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert ("pending" in optimizer.state_dict()["state"][0]) is (two_phase and can)


def test_a_state_of_another_number_of_groups_is_refused() -> None:
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    one, two = GaLoreAdamW(params[:1], rank=2), GaLoreAdamW([{"params": [p], "rank": 2} for p in params])
    for loads, saved in [(one, two), (two, one)]:
        with pytest.raises(ValueError, match="number of parameter groups"):
            loads.load_state_dict(saved.state_dict())


def test_what_belongs_to_no_parameter_is_saved_too() -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    optimizer.state["of a wrapper"] = {"calls": 3}  # type: ignore[index]
    p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    assert saved["of a wrapper"] == {"calls": 3} and saved[0]["step"] == 1 and len(saved) == 2


def test_an_option_that_changes_between_loading_and_the_next_step_counts() -> None:
    def made(gap: int) -> tuple[nn.Parameter, QGaLoreAdamW8bit]:
        p = nn.Parameter(torch.randn(8, 6))
        return p, QGaLoreAdamW8bit([p], rank=2, update_proj_gap=gap, gamma_proj=2, queue_size=1, cos_threshold=0.0)

    def step(p: nn.Parameter, optimizer: QGaLoreAdamW8bit) -> int:
        p.grad = torch.randn_like(p)
        optimizer.step()
        gap: int = optimizer.state[p]["gap"]
        return gap

    p, optimizer = made(2)
    assert [step(p, optimizer) for _ in range(4)] == [2, 2, 4, 4]
    q, other = made(2)
    other.load_state_dict(optimizer.state_dict())
    assert step(q, other) == 8
    q, other = made(2)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["update_proj_gap"] = 7
    assert step(q, other) == 7


def test_an_image_that_is_not_finite_ends_a_refresh_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    subspace, group = TopSingular(), {"refresh": "power", "moments": "keep", "selection": "top", "proj_type": "std"}
    state = {"basis": torch.eye(6)[:, :2].clone(), "seed": 1, "step": 3, "rank": 2, "left": False}
    before = state["basis"].clone()
    low, sketch, accumulation = torch.randn(8, 2), torch.randn(6, 2), subspace.accumulation
    assert accumulation is not None
    assert not accumulation.refresh(subspace, low, None, state, group, Which(), torch.bfloat16).renewed
    assert state["pending"].shape == (8, 2) and state["pending"].dtype == torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(singular, "orthonormalize", lambda tensor: torch.full_like(tensor, torch.nan))
        assert not accumulation.refresh(subspace, low, sketch, state, group, Which(), torch.float32).renewed
        assert "pending" not in state and torch.equal(state["basis"], before)
    accumulation.refresh(subspace, low, None, state, group, Which(), torch.float32)
    assert accumulation.refresh(subspace, low, sketch, state, group, Which(), torch.float32).renewed
    assert not torch.equal(state["basis"], before)


@pytest.mark.parametrize("moments", ["align", "rotate"])
def test_a_column_that_turned_to_a_right_angle_keeps_its_sign(moments: str) -> None:
    old, new = torch.eye(4)[:, :2], torch.eye(4)[:, 2:]
    overlap = overlap_of(old, new, moments)
    assert overlap is not None
    assert overlap.tolist() == ([[1, 0], [0, 1]] if moments == "align" else [[0, 0], [0, 0]])
    assert overlap_of(old, new, "keep") is None
