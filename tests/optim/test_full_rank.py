"""The update of a parameter that is not compressed, with a method and a rule that do nearly nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.optim import finite, state_storage
from lowrank_optim.optim.full_rank import step_full_rank_


class Descent:
    """W <- W + sign size G, and a record of the shapes that it was given."""

    def __init__(self, decay_first: bool = False) -> None:
        self.decay_first = decay_first
        self.seen: list[tuple[int, ...]] = []

    def add_direction_(
        self, target: Tensor, rule: Any, grad: Tensor, state: Any, group: Any, size: float, sign: float
    ) -> None:
        assert target.shape == grad.shape and state["exp_avg"].numel() == target.numel()
        self.seen.append(tuple(target.shape))
        target.add_(grad, alpha=sign * size)

    def finish_(self, target: Tensor, group: Any) -> None:
        target.clamp_(max=2.0)


def stepped(method: Descent, param: Tensor, grad: Tensor, *, elementwise: bool = True, **changes: Any) -> Tensor:
    real = torch.view_as_real(param) if param.is_complex() else param
    options: dict[str, Any] = {"ok": True, "size": 0.5, "sign": -1.0, "weight_decay": 0.1, **changes}
    group = {"weight_decay": options.pop("weight_decay"), "weight_rounding": "nearest"}
    rule = SimpleNamespace(elementwise=elementwise, update_=lambda *_, **__: False)
    state = {"step": 1, "seed": 1, "exp_avg": torch.zeros_like(real)}
    step_full_rank_(method, param, grad, rule, state, group, decay=0.5, **options)  # type: ignore[arg-type]
    return param


def test_a_rule_that_looks_at_more_than_an_element_gets_all_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_storage, "SLICE", 256)
    grad = torch.randn(4, 100)
    for elementwise, shapes in [(True, [(256,), (144,)]), (False, [(4, 100)])]:
        method = Descent()
        moved = stepped(method, torch.zeros(4, 100), grad, elementwise=elementwise)
        assert method.seen == shapes
        torch.testing.assert_close(moved, -0.25 * grad, rtol=1e-6, atol=0)


def test_an_int8_weight_moves_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_storage, "SLICE", 256)
    param, method = torch.zeros(4, 100), Descent()
    codes = torch.zeros(4, 100, dtype=torch.int8), torch.ones(4, 1)
    param.quantized_reference = SimpleNamespace(parts=lambda: codes)  # type: ignore[attr-defined]
    stepped(method, param, torch.ones(4, 100), size=6.0)
    assert method.seen == [(4, 100)] and codes[0].eq(-127).all() and param.eq(0).all()


@pytest.mark.parametrize("decay_first", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_decay_comes_before_or_after_and_not_at_all(decay_first: bool, weight_decay: float) -> None:
    method = Descent(decay_first)
    found = stepped(method, torch.full((3,), 3.0), torch.full((3,), 4.0), weight_decay=weight_decay)
    # 3 / 2 - 2, (3 - 2) / 2 and 3 - 2.
    assert found.tolist() == [(-0.5 if decay_first else 0.5) if weight_decay else 1.0] * 3


def test_what_nobody_may_read_is_masked_and_what_is_complex_is_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.full((3,), torch.nan)
    with monkeypatch.context() as blind:
        blind.setattr(finite, "host_looks", lambda device: False)
        assert stepped(Descent(), torch.ones(3), bad).tolist() == [0.5] * 3
    method = Descent()
    found = stepped(method, torch.full((3,), 3 + 1j), torch.full((3,), 4 - 2j), sign=1.0)
    # The limit of 2 is one for every number of a pair.
    assert method.seen == [(3, 2)] and found.tolist() == [2 + 0j] * 3
