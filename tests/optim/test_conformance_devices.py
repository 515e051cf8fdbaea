"""Where the host does not look at every gradient: what only a GPU and a compiler run, on the CPU, in every row."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.optim.engine import LowRankOptimizer, refresh_due
from lowrank_optim.optim.parts import Group, Norms, State, Step, Update
from lowrank_optim.optim.plans import Plan
from lowrank_optim.optim.views import as_matrices
from tests.conformance import FP32_AND_SLOW_BF16, SHAPES, every_variant, gradients, parameters, quiet, same, train

pytestmark = pytest.mark.filterwarnings("ignore:.*non-finite gradient", "ignore:.*kept an old basis")

# State that a missing gradient leaves as it was, where a gradient of zeros would change it.
LONG_LIVED = ("error", "momentum", "update_norm")


@pytest.fixture
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: False)
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)


def long_lived(optimizer: LowRankOptimizer, p: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[p]
    return {key: value.clone() for key, value in state.items() if key.partition(".")[0] in LONG_LIVED}


def step_with_bad_gradients(optimizer: LowRankOptimizer, params: list[nn.Parameter], step: int, bad: float) -> None:
    for i, (p, grad) in enumerate(zip(params, gradients(params, step))):
        grad.view(-1)[i] = bad
        p.grad = grad
    optimizer.step()


def step_without(optimizer: LowRankOptimizer, params: list[nn.Parameter], step: int) -> None:
    """What the policy says of the same step: at a refresh nothing, else a low-rank gradient of zeros.

    Of a gradient that is not compressed the finite values count, if each is updated for itself.
    """
    plans = {p: optimizer.plan_of(p, optimizer.entry(p).group) for p in params}
    kept = {p: long_lived(optimizer, p) for p in params}
    for (i, (p, plan)), grad in zip(enumerate(plans.items()), gradients(params, step)):
        group = optimizer.entry(p).group
        compressed = plan.parts.subspace is not None
        looks = compressed and refresh_due(plan.state, group, plan.place)
        # The momentum of Trion would move the weight without a gradient, too.
        p.grad = None if looks or (compressed and "ns_steps" in group) else torch.zeros_like(p)
        if not compressed and plan.parts.rule.elementwise:
            grad.view(-1)[i] = 0
            p.grad = grad
        if p.grad is None and not looks:
            optimizer.state[p]["step"] += 1
    optimizer.step()
    for p in params:
        for key, value in kept[p].items():
            optimizer.state[p][key].copy_(value)


@every_variant
@pytest.mark.parametrize("dtype", FP32_AND_SLOW_BF16, ids=str)
@pytest.mark.usefixtures("_blind")
def test_a_gradient_that_is_not_finite_counts_as_missing(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, reference = (quiet(name, ps, **{"weight_decay": 0.0, **kwargs}) for ps in (params, others))
    # A first step, one between two refreshes, and one at a refresh.
    for step, bad in enumerate([float("nan"), 0, 0, float("inf"), 0, float("-inf"), float("nan"), 0, 0]):
        if bad == 0:
            train(optimizer, params, [step])
            train(reference, others, [step])
        else:
            step_with_bad_gradients(optimizer, params, step, bad)
            step_without(reference, others, step)
        for p, q in zip(params, others):
            assert bool(p.isfinite().all())
            for key, value in optimizer.state[p].items():
                # The queue of Q-GaLore is full of NaN until it is full of overlaps.
                assert key == "overlaps" or not isinstance(value, Tensor) or bool(value.isfinite().all()), key
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3 if kwargs.get("state_dtype") == "bfloat16" else 1e-5
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            assert int(optimizer.state[p]["step"]) == int(reference.state[q]["step"])
    assert len(params) == len(SHAPES)


@every_variant
@pytest.mark.usefixtures("_blind")
def test_a_gradient_that_is_not_finite_elsewhere_counts_as_missing_here(name: str, kwargs: dict[str, Any]) -> None:
    """The verdict comes from another process, which has the values that are not finite."""
    params, others = parameters(), parameters()
    optimizer, reference = (quiet(name, ps, **{"weight_decay": 0.0, **kwargs}) for ps in (params, others))
    for one, some in ((optimizer, params), (reference, others)):
        train(one, some, range(1))
    told = torch.tensor(torch.nan)
    for p, grad in zip(params, gradients(params, 1)):
        group = optimizer.entry(p).group
        with torch.no_grad():
            optimizer.update_param(p, grad, group, optimizer._key(group), told)
    step_without(reference, others, 1)
    for p, q in zip(params, others):
        plan = optimizer.plan_of(p, optimizer.entry(p).group)
        # Between two refreshes, and not where every value counts for itself.
        if plan.parts.subspace is not None and optimizer.state[p]["step"] == reference.state[q]["step"]:
            # Moments of 16 bits are rounded by sums whose order may differ.
            tolerance = 1e-2 if kwargs.get("state_dtype") == "bfloat16" else 1e-5
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            for key, value in optimizer.state[p].items():
                torch.testing.assert_close(
                    value, reference.state[q][key], rtol=tolerance, atol=tolerance, equal_nan=True
                )


def compressed(
    name: str, kwargs: dict[str, Any], steps: int
) -> Iterator[tuple[LowRankOptimizer, nn.Parameter, Tensor, Group, Plan]]:
    """An optimizer after some steps, with each parameter that it compresses and the next gradient."""
    params = parameters()
    optimizer = quiet(name, params, **kwargs)
    train(optimizer, params, range(steps))
    for p, grad in zip(params, gradients(params, steps)):
        group = optimizer.entry(p).group
        plan = optimizer.plan_of(p, group)
        if plan.parts.subspace is not None:
            yield optimizer, p, grad, group, plan


@every_variant
def test_a_subspace_that_says_so_has_an_orthonormal_basis(name: str, kwargs: dict[str, Any]) -> None:
    for _, _, grad, group, plan in compressed(name, kwargs, 1):
        subspace, state = plan.parts.subspace, plan.state
        if subspace.low_shape(plan.view, group)[-1] == 0 or "ns_steps" in group:
            continue
        if subspace.factored:
            found = [subspace.basis(subspace.orient(as_matrices(grad, plan.view), state), state, group)]
        else:
            found = [value for key, value in state.items() if key.startswith("basis.")]
        for basis in found:
            off = (basis.mH @ basis - torch.eye(basis.shape[-1])).abs().max()
            assert not subspace.orthonormal or off < 1e-4


@pytest.mark.parametrize("update_proj_gap", [1, 100])
def test_a_skipped_update_is_said_once(update_proj_gap: int) -> None:
    p = nn.Parameter(torch.ones(12, 7))
    optimizer = GaLoreAdamW([p], rank=4, update_proj_gap=update_proj_gap)
    p.grad = torch.randn(12, 7)
    optimizer.step()
    p.grad[3, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="skipped an update because of a non-finite gradient"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@every_variant
def test_a_lift_that_asks_for_norms_reads_them(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for optimizer, p, grad, group, plan in compressed(name, kwargs, 1):
        lift = plan.parts.lift

        def compared(step: Step, state: State, group: Group, lift: Any = lift) -> Update:
            update = type(lift).update
            found = [
                update(
                    lift,
                    step._replace(low=step.low.clone(), direction=step.direction.clone(), norms=norms),
                    some,
                    group,
                )
                for norms, some in ((step.norms, copy.deepcopy(state)), (unknown(step.norms), copy.deepcopy(state)))
            ]
            assert same(*map(tuple, found)) is not lift.needs_norms
            return update(lift, step, state, group)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(lift, "update", compared)
            optimizer.update_param(p, grad, group, optimizer._key(group))


def unknown(norms: Norms | None) -> Norms | None:
    return None if norms is None else Norms(*(torch.full_like(norm, torch.nan) for norm in norms))


@every_variant
def test_a_lift_that_changes_gradients_says_so(name: str, kwargs: dict[str, Any]) -> None:
    for _, _, grad, group, plan in compressed(name, kwargs, 2):
        subspace, _, lift = plan.parts
        oriented = subspace.orient(as_matrices(grad, plan.view), plan.state)
        assert lift.changes_gradient or torch.equal(lift.before(oriented, plan.state, group), oriented)


@pytest.mark.parametrize("refresh", ["svd", "power"])
@pytest.mark.usefixtures("_blind")
def test_a_convolution_keeps_its_bases_where_a_gradient_is_not_finite(refresh: str) -> None:
    p = nn.Parameter(torch.randn(12, 10, 3, 3))
    optimizer = GaLoreAdamW([p], rank=4, update_proj_gap=1, refresh=refresh)
    p.grad = torch.randn(12, 10, 3, 3)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items() if key.startswith("basis.")}
    assert len(before) == 2
    p.grad = torch.randn(12, 10, 3, 3)
    p.grad[1, 2] = torch.nan
    optimizer.step()
    assert p.isfinite().all()
    for key, basis in before.items():
        assert torch.equal(optimizer.state[p][key], basis)


@every_variant
@pytest.mark.usefixtures("_blind")
def test_a_blind_host_changes_nothing_for_finite_gradients(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, others = parameters(), parameters()
    train(quiet(name, params, **kwargs), params, range(5))
    monkeypatch.undo()
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)
    train(quiet(name, others, **kwargs), others, range(5))
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
