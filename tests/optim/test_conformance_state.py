"""What a state may be loaded into, and what a group may change while it runs, in every row of the table."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.optim.parts import Number, Slot
from tests.conformance import (
    FP32_AND_SLOW_BF16,
    SHAPES,
    every_variant,
    gradients,
    noise,
    parameters,
    quiet,
    same,
    snapshot,
    train,
    values,
)
from tests.optimizers import IDS, OPTIMIZERS, VARIANTS, WITHOUT_RANK, accepts

pytestmark = pytest.mark.filterwarnings("ignore:.*took rank", "ignore:.*rebuilt the state", "ignore:.*all get the full")
NAMES = [f"layers.{i}.weight" for i in range(len(SHAPES))]
FEW = [(9, 6), (5,)]


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    # Roles of names are tested elsewhere: with these every matrix is compressed.
    return list(zip(NAMES, params))


@cache
def saved_state(name: str, row: int) -> dict[str, Any]:
    params = parameters(FEW)
    optimizer = quiet(name, params, **VARIANTS[row][1])
    train(optimizer, params, range(2))
    return optimizer.state_dict()


@every_variant
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "every"])
def test_the_state_of_other_rows_loads_or_is_refused(name: str, kwargs: dict[str, Any], every: bool) -> None:
    """All rows of the same class, and of other classes the first one or all."""
    firsts = {other: row for row, (other, _) in reversed([*enumerate(VARIANTS)])}
    rows = [row for row, (other, _) in enumerate(VARIANTS) if every or other == name or firsts[other] == row]
    params = parameters(FEW)
    optimizer = quiet(name, params, **kwargs)
    train(optimizer, params, range(2))
    refused = loaded = 0
    for row in rows:
        saved, before = saved_state(VARIANTS[row][0], row), snapshot(optimizer)
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            refused += 1
            assert "state_dict" in str(error), IDS[row]
            assert same(snapshot(optimizer), before), IDS[row]
            continue
        loaded += 1
        for p in params:
            assert optimizer.state[p]["step"] == 2, IDS[row]
        train(optimizer, params, [2])
        assert all(bool(p.isfinite().all()) for p in params), IDS[row]
    assert loaded >= 1
    assert refused + loaded == len(rows)


@every_variant
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_touched(name: str, kwargs: dict[str, Any]) -> None:
    params = parameters()
    optimizer = quiet(name, named(params), **kwargs)
    train(optimizer, params, range(2))
    good, before = optimizer.state_dict(), snapshot(optimizer)
    broken: list[tuple[str, dict[str, Any]]] = []
    for i in (0, len(params) - 1):
        for key, value in good["state"][i].items():
            slot = optimizer.slots_of(params[i], optimizer.param_groups[0])[key]
            if isinstance(value, Tensor) and value.numel() > 1:
                broken.append((key, {**good["state"][i], key: torch.cat((value, value))}))
                other = torch.int64 if slot.dtype != torch.int64 else torch.float32  # type: ignore[union-attr]
                broken.append((key, {**good["state"][i], key: value.to(other)}))
            # A correction comes and goes with the dtype of the weight.
            if key == "step" or (isinstance(slot, Slot) and not slot.late and key != "weight_correction"):
                broken.append((key, {k: v for k, v in good["state"][i].items() if k != key}))
            if isinstance(slot, Number) and slot.fixed:
                broken.append((key, {**good["state"][i], key: slot.initial + 7}))
        for key, entry in broken:
            with pytest.raises(ValueError, match="Invalid state_dict") as error:
                optimizer.load_state_dict({**good, "state": {**good["state"], i: entry}})
            assert repr(key) in str(error.value) and NAMES[i] in str(error.value) and "expected" in str(error.value)
        broken.clear()
    foreign = {**good["state"][0], "exp_avg_slow": torch.zeros(3), "momentum.codes.left": torch.zeros(3)}
    with pytest.raises(ValueError, match="expected nothing"):
        optimizer.load_state_dict({**good, "state": {**good["state"], 0: foreign}})
    assert same(snapshot(optimizer), before)


@every_variant
@pytest.mark.parametrize(
    "shapes",
    [
        [(12, 8), *SHAPES[1:]],
        pytest.param([(7, 12), (12, 7), *SHAPES[2:]], marks=pytest.mark.slow),
        pytest.param([*SHAPES[:-1], (10**5,)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parameters_of_another_shape_are_refused(
    name: str, kwargs: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    params, others = parameters(), parameters(shapes)
    small, large = quiet(name, params, **kwargs), quiet(name, others, **kwargs)
    train(small, params, range(1))
    train(large, others, range(1))
    before = snapshot(large)
    with pytest.raises(ValueError, match=r"Invalid state_dict: '.*' of parameter \d is .*, expected"):
        large.load_state_dict(small.state_dict())
    assert same(snapshot(large), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_torchs_optimizer_is_refused(name: str) -> None:
    params = parameters(FEW)
    adam = torch.optim.AdamW(params)
    for p, grad in zip(params, gradients(params, 0)):
        p.grad = grad
    adam.step()
    optimizer = quiet(name, params)
    train(optimizer, params, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="group 0 belongs to another optimizer"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="Invalid state_dict"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": adam.state_dict()["state"]})
    assert same(snapshot(optimizer), before)


@every_variant
def test_states_are_found_by_name_whatever_the_order(name: str, kwargs: dict[str, Any]) -> None:
    params, others = parameters(), parameters()
    optimizer = quiet(name, named(params), **{**kwargs, "stagger": False})
    shuffled = quiet(name, named(others)[::-1], **{**kwargs, "stagger": False})
    # Seeds come from names, too.
    train(optimizer, params, range(4))
    train(shuffled, others, range(4))
    assert same(values(optimizer, params), values(shuffled, others))
    fresh = parameters()
    with torch.no_grad():
        for p, q in zip(fresh, params):
            p.copy_(q)
    resumed = quiet(name, named(fresh)[::-1], **{**kwargs, "stagger": False})
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(4, 8))
    train(resumed, fresh, range(4, 8))
    assert same(values(optimizer, params), values(resumed, fresh))
    renamed = quiet(name, [(f"other.{i}", p) for i, p in enumerate(fresh)], **kwargs)
    with pytest.raises(ValueError, match=r"other names than the optimizer's"):
        renamed.load_state_dict(optimizer.state_dict())


DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    pytest.param(torch.float32, torch.float16, marks=pytest.mark.slow),
]


@every_variant
@pytest.mark.parametrize(("before", "after"), DTYPES, ids=str)
def test_weights_of_another_dtype_continue(
    name: str, kwargs: dict[str, Any], before: torch.dtype, after: torch.dtype
) -> None:
    if after == torch.float16 and kwargs.get("weight_rounding", "nearest") != "nearest":
        kwargs = {**kwargs, "weight_rounding": "nearest"}
    params = parameters(dtype=before)
    optimizer = quiet(name, params, **kwargs)
    train(optimizer, params, range(5))
    others = [nn.Parameter(p.detach().to(after)) for p in params]
    loaded = quiet(name, others, **kwargs)
    loaded.load_state_dict(optimizer.state_dict())
    for p in params:
        p.data = p.data.to(after)
    for q in others:
        for key, slot in loaded.slots_of(q, loaded.param_groups[0]).items():
            if isinstance(slot, Slot) and not slot.late:
                assert loaded.state[q][key].dtype == slot.dtype, key
    for step in range(5, 8):
        train(optimizer, params, [step])
        train(loaded, others, [step])
    for p, q in zip(params, others):
        assert p.dtype == q.dtype == after
        assert optimizer.state[p]["step"] == 8
        assert bool(p.isfinite().all())
    # The correction of a bfloat16 weight begins with zeros either way.
    assert same(values(optimizer, params), values(loaded, others))


def changes_of(name: str, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of a group to change in mid-run, to values that the row does not have."""
    choices: dict[str, tuple[Any, ...]] = {
        "state_dtype": ("int8", "bfloat16", "float32"),
        "weight_rounding": ("compensated", "stochastic"),
        "proj_type": ("left", "right", "reverse_std"),
        "error_feedback": ("full", "int8", None) if name == "DCTAdamW" else (True, False),
        "update_proj_gap": (1, 2),
        "projection": ("svd", "columns", "random", "dct"),
        "density": (0.3, None),
        "proj": ("svd", "random"),
        "beta1": (0.5, None),
        "capturable": (True, False),
        "queue_size": (3,),
        "quant_group_size": (16,),
        "basis": ("dct3",) if kwargs.get("similarity") == "fft" else ("identity", "dct2"),
    }
    found: list[dict[str, Any]] = [{"rank": rank} for rank in (2, 6, None)] if name not in WITHOUT_RANK else []
    if name in ("LOROAdamW", "SSTAdamW"):
        choices.pop("capturable")
    for option, candidates in choices.items():
        if accepts(name, option):
            found += [{option: value} for value in candidates if value != kwargs.get(option, object())]
    if name.startswith("GaLore"):
        found.append({"proj_type": "full"})
    return found


@every_variant
@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
@pytest.mark.usefixtures("_small_moments_in_8_bits")
def test_a_group_that_changes_in_mid_run(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    for change in changes_of(name, kwargs):
        if "weight_rounding" in change and dtype == torch.float32:
            continue
        params = parameters(FEW, dtype)
        optimizer = quiet(name, params, **kwargs)
        train(optimizer, params, range(2))
        optimizer.param_groups[0].update(change)
        train(optimizer, params, range(2, 5))
        fresh = quiet(name, [nn.Parameter(p.detach().clone()) for p in params], **{**kwargs, **change})
        for p, q in zip(params, fresh.param_groups[0]["params"]):
            slots = fresh.slots_of(q, fresh.param_groups[0])
            present = optimizer.state[p]
            assert {k for k, s in slots.items() if isinstance(s, Number) or not s.late} == present.keys(), change
            for key, slot in slots.items():
                if isinstance(slot, Slot):
                    assert (tuple(present[key].shape), present[key].dtype) == (slot.shape, slot.dtype), (change, key)
            assert bool(p.isfinite().all()), change
        assert [row[2:] for row in optimizer.explain()] == [row[2:] for row in fresh.explain()], change


@pytest.mark.parametrize(("name", "kwargs"), [row for row in VARIANTS if "state_dtype" not in row[1]], ids=str)
def test_a_rule_that_treats_rows_for_themselves_says_so(name: str, kwargs: dict[str, Any]) -> None:
    """So that it may get some rows, or some elements, of what other processes have the rest of."""
    params = parameters(FEW)
    optimizer = quiet(name, params, **kwargs)
    train(optimizer, params, range(2))
    for p in params:
        plan = optimizer.plan_of(p, optimizer.entry(p).group)
        group, rule, subspace = optimizer.entry(p).group, plan.parts.rule, plan.parts.subspace
        if not (rule.elementwise if subspace is None else rule.rowwise):
            continue
        low = torch.randn(p.shape if subspace is None else subspace.low_shape(plan.view, group))
        kept = slice(1, None, 2)
        some, whole = (
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in plan.state.items()}
            for _ in range(2)
        )
        for key, value in some.items():
            if isinstance(value, Tensor) and value.shape == low.shape:
                some[key] = value[kept].clone()
        found, expected = rule.direction(low[kept].clone(), some, group), rule.direction(low.clone(), whole, group)
        torch.testing.assert_close(found, expected[kept])
        for key, value in whole.items():
            part = isinstance(value, Tensor) and value.shape == low.shape
            torch.testing.assert_close(some[key], value[kept] if part else value, equal_nan=True)


@every_variant
@pytest.mark.usefixtures("_small_moments_in_8_bits")
def test_a_change_that_no_step_has_seen_is_saved(name: str, kwargs: dict[str, Any]) -> None:
    """A parameter without a gradient has, when it is saved, still the state of the old options."""
    changes = changes_of(name, kwargs)
    for change in (changes[0], changes[-1], *(one for one in changes if "state_dtype" in one)):
        params = parameters(FEW)
        optimizer = quiet(name, params, **kwargs)
        train(optimizer, params, range(2))
        optimizer.param_groups[0].update(change)
        saved = copy.deepcopy(optimizer.state_dict())
        others = [nn.Parameter(p.detach().clone()) for p in params]
        loaded = quiet(name, others, **kwargs)
        loaded.load_state_dict(saved)
        for one, some in ((optimizer, params), (loaded, others)):
            train(one, some, range(2, 5))
        assert same(values(optimizer, params), values(loaded, others)), change


@pytest.fixture
def _small_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)


@pytest.mark.filterwarnings("default:.*rebuilt the state")
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - WITHOUT_RANK))
def test_a_change_of_rank_is_said_once_and_begins_anew(name: str) -> None:
    params = parameters(FEW)
    optimizer = quiet(name, params)
    train(optimizer, params, range(4))
    optimizer.param_groups[0]["rank"] = 2
    assert "its state has rank 4; the next step rebuilds it with rank 2" in optimizer.explain()[0].reason
    others = [nn.Parameter(p.detach().clone()) for p in params]
    with pytest.warns(RuntimeWarning, match="rebuilt the state of parameters because an option") as caught:
        train(optimizer, params, range(4, 8))
        optimizer.param_groups[0]["rank"] = 3
        train(optimizer, params, range(8, 9))
    assert len(caught) == 1
    assert optimizer.explain()[0].method == "rank 3"
    # From a change on the matrix is trained as by a new optimizer; the vector keeps its state.
    fresh = quiet(name, others, rank=2)
    train(fresh, others, range(4, 8))
    replay = [nn.Parameter(p.detach().clone()) for p in parameters(FEW)]
    again = quiet(name, replay)
    train(again, replay, range(4))
    again.param_groups[0]["rank"] = 2
    train(again, replay, range(4, 8))
    assert torch.equal(replay[0], others[0])
    assert again.state[replay[1]]["step"] == 8


@every_variant
def test_the_first_step_is_linear_in_the_number_of_parameters(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparisons and look-ups of parameters, counted."""
    counts = []
    for number in (10, 20):
        hashed = 0
        original = Tensor.__hash__

        def count(self: Tensor, original: Any = original) -> int:
            nonlocal hashed
            hashed += 1
            return int(original(self))

        params = [nn.Parameter(t) for t in noise([(6, 5)] * number, 0)]
        optimizer = quiet(name, params, **kwargs)
        for p in params:
            p.grad = torch.ones_like(p)
        monkeypatch.setattr(Tensor, "__hash__", count)
        optimizer.step()
        monkeypatch.undo()
        counts.append(hashed)
    assert counts[0] > 0
    assert counts[1] <= 2 * counts[0] + 20


def test_nothing_of_a_gradient_is_kept() -> None:
    for name, kwargs in VARIANTS:
        params = parameters()
        optimizer = quiet(name, params, **kwargs)
        train(optimizer, params, range(4))
        held = {p.grad.untyped_storage().data_ptr() for p in params if p.grad is not None}
        for state in optimizer.state.values():
            for key, value in state.items():
                assert not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in held, (name, key)
