"""Checks of single values, keys of groups, and what an option's value may be."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.optim import options
from lowrank_optim.optim.parts import REQUIRED, Lift, Number, Option, Rule, Slot, Subspace
from lowrank_optim.optim.rules.adafactor import check_eps
from lowrank_optim.optim.rules.adam import check_betas
from lowrank_optim.optim.validation import check_positive_int, check_range
from tests.optimizers import OPTIMIZERS

INF = float("inf")


@pytest.mark.parametrize(
    ("value", "arguments", "interval"),
    [
        (0.0, {"low": 0.0}, None),
        (5, {"low": 0.0}, None),
        (torch.tensor(0.5), {"low": 0.0, "high": 1.0}, None),
        (torch.tensor([0.5]), {"low": 0.0, "high": 1.0}, None),
        (1.0, {"low": 0.0, "high": 1.0}, None),
        (-0.1, {"low": 0.0}, "a number in [0, inf)"),
        (INF, {"low": 0.0}, "a number in [0, inf)"),
        (float("nan"), {"low": 0.0}, "a number in [0, inf)"),
        (1.0, {"low": 0.0, "high": 1.0, "high_open": True}, "a number in [0, 1)"),
        (1.1, {"low": 0.0, "high": 1.0}, "a number in [0, 1]"),
        (torch.tensor(2.0), {"low": 0.0, "high": 1.0}, "a number in [0, 1]"),
        (True, {"low": 0.0}, "a number in [0, inf)"),
        ("1", {"low": 0.0}, "a number in [0, inf)"),
        (None, {"low": 0.0}, "a number in [0, inf)"),
        (torch.zeros(2), {"low": 0.0}, "one element"),
    ],
)
def test_ranges(value: Any, arguments: dict[str, Any], interval: str | None) -> None:
    if interval is None:
        check_range("x", value, **arguments)
        return
    with pytest.raises(ValueError, match="Invalid x: ") as error:
        check_range("x", value, **arguments)
    assert str(error.value).endswith(f"expected {interval}")


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_positive_ints(value: Any) -> None:
    for valid in (1, 7):
        check_positive_int("x", valid)
        check_positive_int("x", valid, optional=True)
    with pytest.raises(ValueError, match=r"expected a positive int$"):
        check_positive_int("x", value)
    if value is None:
        check_positive_int("x", value, optional=True)
        options.optional_positive_int("x", value)
    else:
        with pytest.raises(ValueError, match=r"expected a positive int or None$"):
            check_positive_int("x", value, optional=True)


@pytest.mark.parametrize("value", [-1, True, 1.0, None])
def test_natural_numbers(value: Any) -> None:
    options.natural("x", 0)
    options.natural("x", 3)
    with pytest.raises(ValueError, match=r"Invalid x: .*expected a non-negative int"):
        options.natural("x", value)


@pytest.mark.parametrize("value", [0.9, "ab", (0.9,), (0.9, 0.9, 0.9), None, (1.0, 0.9), (0.9, -0.1), (0.9, 1.0)])
def test_betas(value: Any) -> None:
    check_betas("betas", [0.0, 0.999])
    check_betas("betas", (0.9, 0.0))
    with pytest.raises(ValueError, match="Invalid betas"):
        check_betas("betas", value)


@pytest.mark.parametrize("value", [1e-8, "ab", (1e-8,), (1e-8, 1e-3, 1.0), (0.0, 1e-3), (1e-30, -1.0)])
def test_eps_of_adafactor(value: Any) -> None:
    check_eps("eps", [1e-30, 0.0])
    with pytest.raises(ValueError, match="Invalid eps"):
        check_eps("eps", value)


def test_defaults_of_options_that_are_not_given() -> None:
    known = {
        "lr": Option(options.number()),
        "rank": Option(options.positive_int),
        "scale": Option(options.number(), 2.0),
    }
    assert options.complete({"lr": 1, "rank": 3}, known, "X") == {"lr": 1, "rank": 3, "scale": 2.0}
    assert options.complete({"lr": 1, "rank": 3, "scale": 5}, known, "X")["scale"] == 5
    with pytest.raises(TypeError, match="X has no option 'scal'; did you mean scale"):
        options.complete({"lr": 1, "rank": 3, "scal": 5}, known, "X")
    with pytest.raises(TypeError, match="X misses the option 'rank'"):
        options.complete({"lr": 1}, known, "X")
    assert known["lr"].default is REQUIRED


# What torch's schedulers, torch itself and this package write into a group.
FOREIGN = [
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "name", "differentiable"),
    *("param_names", "param_roles", "clip_norm"),
]


@pytest.mark.parametrize("key", FOREIGN)
def test_a_group_may_hold_what_others_write(key: str) -> None:
    options.check_names({"params": [], "lr": 1.0, key: None}, ["lr"], "X")
    with pytest.raises(ValueError, match=f"Invalid option '{key}s' in a parameter group: X does not have it"):
        options.check_names({"params": [], f"{key}s": None}, ["lr"], "X")


def test_options_of_a_constructor() -> None:
    given = {"self": 0, "params": 1, "__class__": 2, "lr": 3, "common": {"stagger": True}}
    assert options.arguments(given) == {"lr": 3, "stagger": True}
    assert options.arguments({"self": 0, "lr": 3}) == {"lr": 3}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_signature_names_every_option_once(name: str) -> None:
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    assert set(options.Common.__annotations__) <= set(parameters) and "self" not in parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    inherited = type("Inherited", (OPTIMIZERS[name],), {})
    assert list(inspect.signature(inherited).parameters) == list(parameters)


def test_a_class_without_common_options_keeps_its_signature() -> None:
    class Bare:
        def __init__(self) -> None: ...

    class Plain:
        def __init__(self, a: int = 1) -> None: ...

    class Own:
        def __init__(self, *, stagger: int = 5, **common: Any) -> None: ...

    for cls, names in [(Bare, []), (Plain, ["a"]), (Own, ["stagger", "state_dtype", "weight_rounding"])]:
        options.expand_signature(cls)
        assert list(inspect.signature(cls).parameters)[:3] == names
    assert inspect.signature(Own).parameters["stagger"].default == 5


@pytest.mark.parametrize("key", ["lr", "weight_decay", "adamw_lr"])
def test_what_changes_during_a_run_renews_no_plan(key: str) -> None:
    p = nn.Parameter(torch.randn(8, 6))
    optimizer = OPTIMIZERS["Trion"]([p], rank=2)
    group = optimizer.param_groups[0]
    before = optimizer.plan_of(p, group)
    group[key] = 0.5
    assert optimizer.plan_of(p, group) is before
    group["stagger"] = True
    assert optimizer.plan_of(p, group) is not before


def test_a_part_has_no_capability_that_it_does_not_declare() -> None:
    assert Subspace.flattens and Subspace.factored and Subspace.follows_gradient and Subspace.accumulation is None
    assert not Rule.elementwise and not Lift.needs_norms and Lift().reads_gradient({}) and Subspace().sees_all({})
    assert not Slot((), torch.float32).late and not Number(0).fixed


def test_a_group_with_a_wrong_value_is_not_added() -> None:
    p, q = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    for wrong, message in [({"rank": 0}, "Invalid rank"), ({"rnk": 2}, "Invalid option 'rnk'.*did you mean rank")]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [q], **wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q], "rank": 3})
    assert optimizer.entry(q).place == 1 and optimizer.slots_of(q, optimizer.param_groups[1])["basis"].shape == (6, 3)
