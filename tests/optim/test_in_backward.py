"""Updates inside of the backward pass against the ordinary loop, the unsplit batch and a hand computation."""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import DCTAdamW, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit, step_in_backward
from lowrank_optim.ops.orthonormal import orthonormalize, subspace_iteration
from tests.conformance import every_variant, nightly
from tests.optimizers import OPTIMIZERS, build


class Net(nn.Module):
    """Tied embedding and head, two matrices of either orientation, a bias, and a matrix that no loss depends on."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.unused = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.frozen(self.embed(ids))
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return nn.functional.cross_entropy(hidden[:, :-1].flatten(0, 1) @ self.embed.weight.mT, ids[:, 1:].flatten())


def batches(number: int, size: int = 8, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(11, (number, size, 6), generator=torch.Generator().manual_seed(seed)))


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def ordinary(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for ids in data:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model: nn.Module, handle: Any, data: list[Tensor]) -> None:
    for ids in data:
        for part in ids.chunk(handle.accumulate):
            with handle.micro_batch():
                (model(part) / handle.accumulate).backward()


def same(ours: nn.Module, theirs: nn.Module, optimizers: tuple[Any, Any]) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        for name, value in state.items():
            other = states[1][key][name]
            equal = torch.equal(value.nan_to_num(), other.nan_to_num()) if isinstance(value, Tensor) else value == other
            assert equal, name


@every_variant
def test_every_optimizer_makes_the_same_updates(name: str, kwargs: dict[str, Any]) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    plain, fused = (build(name, parameters(m), **kwargs) for m in (model, twin))
    handle = step_in_backward(fused)
    data = batches(7)
    ordinary(model, plain, data)
    for number, ids in enumerate(data):
        if number % 2:
            with handle.micro_batch():
                twin(ids).backward()
        else:
            twin(ids).backward()
        assert all(p.grad is None for p in parameters(twin))
        # What a loop does that was not changed.
        fused.step()
        fused.zero_grad()
    same(model, twin, (plain, fused))


METHODS: list[tuple[type, dict[str, Any]]] = [
    (GaLoreAdamW, {}),
    (GaLoreAdamW, {"moments": "rotate", "proj_type": "right"}),
    (GaLoreAdamW, {"moments": "align", "stagger": True}),
    (GaLoreAdamW, {"refresh": "randomized"}),
    (GaLoreAdamW, {"refresh": "svd"}),
    (GaLoreAdamW, {"proj_type": "full"}),
    (GaLoreAdamW, {"update_proj_gap": 1}),
    (GaLoreAdamW8bit, {}),
    (QGaLoreAdamW8bit, {"queue_size": 1, "cos_threshold": 0.2, "quant_group_size": 7}),
    (QGaLoreAdamW8bit, {"queue_size": 1, "cos_threshold": 0.2, "refresh": "power"}),
    (DCTAdamW, {}),
    (DCTAdamW, {"basis": "identity"}),
    (DCTAdamW, {"ell_norm": 1}),
    (DCTAdamW, {"error_feedback": "full"}),
    (DCTAdamW, {"update_proj_gap": 1}),
    *(
        (OPTIMIZERS[name], {})
        for name in ("FiraAdamW", "APOLLOAdamW", "FRUGALAdamW", "Trion", "LDAdamW", "GaLoreAdafactor")
    ),
]


@pytest.mark.parametrize(("cls", "kwargs"), METHODS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
@pytest.mark.parametrize("accumulate", [2, *nightly(4)])
def test_micro_batches_equal_the_unsplit_batch(cls: type, kwargs: dict[str, Any], accumulate: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = Net()
        kwargs = {"rank": 4, "update_proj_gap": 3, "lr": 1e-2, **kwargs}
        optimizer = cls(parameters(model), **kwargs)
        # The first basis comes from the first micro-batch: give both the same.
        ordinary(model, optimizer, batches(1))
        twin = copy.deepcopy(model)
        other = cls(parameters(twin), **kwargs)
        other.load_state_dict(optimizer.state_dict())
        unsplit = step_in_backward(optimizer, two_phase=True)
        split = step_in_backward(other, accumulate=accumulate)
        for ids in batches(11, seed=1):
            train(model, unsplit, [ids])
            train(twin, split, [ids])
            torch.testing.assert_close(split.grad_norm, unsplit.grad_norm)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)
    gaps = [[state.get("gap") for state in o.state.values()] for o in (optimizer, other)]
    assert gaps[0] == gaps[1]


def test_a_refresh_in_two_phases_by_hand() -> None:
    weight = nn.Parameter(torch.randn(9, 6))
    grads = [torch.randn(9, 6) for _ in range(5)]
    optimizer = GaLoreAdamW([weight], rank=2, update_proj_gap=2, lr=1e-2)
    handle = step_in_backward(optimizer, accumulate=2)
    bases = []
    for grad in grads:
        for share in (0.25, 0.75):
            with handle.micro_batch():
                (weight * grad * share).sum().backward()
        bases.append(optimizer.state[weight]["basis"].clone())
    # Due at the third update; its second half at the fourth, and used from the fifth on.
    for index in (1, 2):
        assert torch.equal(bases[index], bases[0])
    image = orthonormalize(grads[2] @ bases[0])
    torch.testing.assert_close(bases[3], orthonormalize(grads[3].mT @ image))
    assert torch.equal(bases[4], bases[3])
    assert "pending" in optimizer.state[weight]


def test_with_an_unchanging_gradient_the_two_phases_are_a_subspace_iteration() -> None:
    weight = nn.Parameter(torch.randn(9, 6))
    grad = torch.randn(9, 6)
    optimizer = GaLoreAdamW([weight], rank=2, update_proj_gap=2)
    handle = step_in_backward(optimizer, two_phase=True)
    for step in range(4):
        with handle.micro_batch():
            (weight * grad).sum().backward()
        if step == 1:
            start = optimizer.state[weight]["basis"].clone()
    torch.testing.assert_close(optimizer.state[weight]["basis"], subspace_iteration(grad, start))


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_resume_between_the_two_phases(cut: int) -> None:
    def start() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = Net()
        optimizer = GaLoreAdamW(parameters(model), rank=4, update_proj_gap=3, moments="rotate")
        return model, step_in_backward(optimizer, accumulate=2, max_norm=0.1)

    data = batches(8)
    model, handle = start()
    train(model, handle, data[:cut])
    assert any("pending" in state for state in handle.optimizer.state.values()) == (cut == 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), handle.optimizer.state_dict(), handle.state_dict()), file)
    train(model, handle, data[cut:])
    resumed, other = start()
    file.seek(0)
    for target, state in zip((resumed, other.optimizer, other), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(state)
    train(resumed, other, data[cut:])
    same(model, resumed, (handle.optimizer, other.optimizer))


@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_parameters(sum_dtype: torch.dtype) -> None:
    model = Net().bfloat16()
    optimizer = GaLoreAdamW8bit(parameters(model), rank=4, update_proj_gap=2, lr=1e-2)
    handle = step_in_backward(optimizer, accumulate=4, sum_dtype=sum_dtype)
    data = batches(1)
    before = model(data[0]).item()
    train(model, handle, data * 20)
    assert model(data[0]).item() < before - 0.5


def test_rounded_sums_are_unbiased() -> None:
    weight = nn.Parameter(torch.zeros(40, 30))
    grad = torch.randn(40, 30)
    optimizer = GaLoreAdamW([weight], rank=20)
    lows = []
    optimizer.step_low = lambda param, low, group: lows.append(low.clone())  # type: ignore[method-assign]
    handle = step_in_backward(optimizer, accumulate=64, sum_dtype=torch.bfloat16)
    for _ in range(64):
        with handle.micro_batch():
            (weight * grad / 64).sum().backward()
    exact = grad @ optimizer.state[weight]["basis"]
    # To the nearest, a term of 1/64 is lost half of the time.
    assert float((lows[0] - exact).norm() / exact.norm()) < 0.02
    assert float(((lows[0] - exact) * exact).sum().abs() / exact.square().sum()) < 0.003


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_one_gradient_lives_at_a_time(accumulate: int) -> None:
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    seen: list[Any] = []
    alive: list[int] = []
    for p in layers.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    handle = step_in_backward(GaLoreAdamW(layers.parameters(), rank=4), accumulate=accumulate)
    for p in layers.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(ref() is not None for ref in seen)))
    for _ in range(2 * accumulate):
        with handle.micro_batch():
            layers(torch.randn(3, 16)).square().sum().backward()
    assert len(seen) == len(alive) == 12 * accumulate
    assert max(alive) == 0


def test_norm_and_clipping() -> None:
    model, data = Net(), batches(3)
    twin = copy.deepcopy(model)
    optimizer = GaLoreAdamW(parameters(model), rank=None, lr=0.0)
    handle = step_in_backward(optimizer, max_norm=0.01)
    assert handle.grad_norm is None
    for ids in data:
        twin.zero_grad()
        twin(ids).backward()
        exact = torch.nn.utils.clip_grad_norm_(twin.parameters(), float("inf"))
        model(ids).backward()
        torch.testing.assert_close(handle.grad_norm, exact)


@pytest.mark.parametrize("clip_by", ["previous", "layer"])
def test_clipped_gradients(clip_by: str) -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    optimizer = GaLoreAdamW([first, second], rank=None, betas=(0.0, 0.0))
    step_in_backward(optimizer, max_norm=1.0, clip_by=clip_by)
    norms = [(3.0, 0.5), (1.0, 2.0)]
    # The first update has none before it: no more than if both were as large.
    first_factors = (1 / (3 * 2**0.5), 1.0)
    factors = {"layer": [(1 / 3, 1.0), (1.0, 0.5)], "previous": [first_factors, (1 / 9.25**0.5, 1 / 9.25**0.5)]}
    for (a, b), expected in zip(norms, factors[clip_by], strict=True):
        (first[0] * a + second[0] * b).backward()
        for p, norm, factor in zip((first, second), (a, b), expected, strict=True):
            assert optimizer.state[p]["exp_avg"].norm().item() == pytest.approx(norm * factor, rel=1e-6)


def test_a_gradient_that_is_not_finite_leaves_the_parameter_and_the_clipping_alone() -> None:
    model = Net()
    handle = step_in_backward(GaLoreAdamW(parameters(model), rank=4), accumulate=2, max_norm=1.0)
    train(model, handle, batches(2))
    before, norm = copy.deepcopy(model.state_dict()), handle.state_dict()["clip_norm"]
    with pytest.warns(RuntimeWarning, match="non-finite"):
        for factor in (1.0, float("nan")):
            with handle.micro_batch():
                (model(batches(1)[0]) * factor).backward()
    assert not handle.grad_norm.isfinite()
    assert torch.equal(handle.state_dict()["clip_norm"], norm)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_clipping_after_a_first_norm_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = GaLoreAdamW([weight], rank=None, betas=(0.0, 0.0))
    step_in_backward(optimizer, max_norm=1.0)
    with pytest.warns(RuntimeWarning, match="non-finite"):
        (weight.sum() * float("inf")).backward()
    (weight[0] * 5).backward()
    assert optimizer.state[weight]["exp_avg"].norm().item() == pytest.approx(1.0)


def test_complex_gradients_are_clipped_by_their_length() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = GaLoreAdamW([weight], rank=None, betas=(0.0, 0.0))
    handle = step_in_backward(optimizer, max_norm=1.0)
    (weight * torch.tensor([3.0, 4j])).real.sum().backward()
    assert handle.grad_norm.item() == pytest.approx(5.0) and not handle.grad_norm.is_complex()
    assert optimizer.state[weight]["exp_avg"].norm().item() == pytest.approx(1.0)


def test_a_matrix_without_a_gradient_takes_its_basis_from_the_next_sum() -> None:
    weight = nn.Parameter(torch.zeros(8, 6))
    handle = step_in_backward(GaLoreAdamW([weight], rank=2, update_proj_gap=100), accumulate=2)
    for update in range(2):
        for _ in range(2):
            with handle.micro_batch():
                (weight * torch.randn(8, 6) * update).sum().backward()
    assert weight.any()


def test_without_clipping_no_norm_is_kept() -> None:
    model = Net()
    optimizer = GaLoreAdamW(parameters(model), rank=4)
    handle = step_in_backward(optimizer)
    train(model, handle, batches(3))
    assert handle.grad_norm > 0 and "clip_norm" not in optimizer.param_groups[0]
    handle.remove()
    # Nor where no update looks back at the one before.
    train(model, step_in_backward(optimizer, max_norm=1.0, clip_by="layer"), batches(3))
    assert "clip_norm" not in optimizer.param_groups[0]


def test_clipping_after_a_state_of_a_run_without_it() -> None:
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GaLoreAdamW([p], rank=2)
    saved = GaLoreAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2).state_dict()
    handle = step_in_backward(optimizer, max_norm=1.0)
    optimizer.load_state_dict(saved)
    p.sum().backward()
    assert handle.grad_norm == pytest.approx(48**0.5) and p.ne(0).any()
    assert optimizer.param_groups[0]["clip_norm"] == handle.grad_norm


def test_a_first_micro_batch_without_a_gradient() -> None:
    model = Net()
    handle = step_in_backward(GaLoreAdamW(parameters(model), rank=4), accumulate=2)
    before = copy.deepcopy(model.state_dict())
    for factor in (0.0, 1.0):
        with handle.micro_batch():
            (model(batches(1)[0]) * factor).backward()
    assert not torch.equal(model.up.weight, before["up.weight"])
    assert torch.equal(model.unused.weight, before["unused.weight"])


def test_a_parameter_without_a_gradient_in_the_last_micro_batch_is_updated() -> None:
    used = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)] + [nn.Parameter(torch.randn(5))]
    optimizer = GaLoreAdamW(used, rank=2)
    handle = step_in_backward(optimizer, accumulate=2)
    with handle.micro_batch():
        sum(p.sum() for p in used).backward()
    with handle.micro_batch(last=True):
        used[0].sum().backward()
    assert [optimizer.state[p]["step"] for p in used] == [1, 1, 1]
    assert all(p.grad is None for p in used)


def test_scheduler_steps_once_an_update() -> None:
    model = Net()
    optimizer = GaLoreAdamW(parameters(model), rank=4, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    handle = step_in_backward(optimizer, accumulate=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in batches(3):
            train(model, handle, [ids])
            optimizer.step()
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state[model.up.weight]["step"] == 3


def test_group_options_are_those_of_a_loaded_state() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = GaLoreAdamW([weight], rank=None, lr=1.0)
    step_in_backward(optimizer)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.0
    # Torch replaces the group by another dict here.
    optimizer.load_state_dict(state)
    weight.sum().backward()
    assert torch.equal(weight, torch.zeros(3))


def test_between_micro_batches_neither_step_nor_checkpoint() -> None:
    model = Net()
    handle = step_in_backward(optimizer := GaLoreAdamW(parameters(model), rank=4), accumulate=2)
    with handle.micro_batch(last=False):
        model(batches(1)[0]).backward()
    for action in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="after 1 of 2 micro-batches"):
            action()
    handle.abandon()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.state_dict()["state"] == {} or all(s["step"] == 0 for s in optimizer.state.values())


def test_miscounting_raises() -> None:
    model, ids = Net(), batches(1)[0]
    handle = step_in_backward(GaLoreAdamW(parameters(model), rank=4), accumulate=2)
    with pytest.raises(RuntimeError, match="micro_batch"):
        model(ids).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="1 of 2 is not the last"), handle.micro_batch(last=True):
        pass
    with pytest.raises(RuntimeError, match="two gradients"), handle.micro_batch():
        model(ids).backward()
        model(ids).backward()
    # An error abandons the update.
    assert all(p.grad is None for p in model.parameters())
    train(model, handle, [ids])


def test_an_update_of_fewer_micro_batches() -> None:
    """The last one of an epoch, for instance."""
    models = [Net().double(), Net().double()]
    models[1].load_state_dict(models[0].state_dict())
    for model, counts in zip(models, ((2, 1, 2), (2, 2, 2))):
        handle = step_in_backward(GaLoreAdamW(parameters(model), rank=4, update_proj_gap=1), accumulate=2)
        for count, ids in zip(counts, batches(3)):
            handle.accumulate = count
            train(model, handle, [ids])
    for p, q in zip(*map(parameters, models), strict=True):
        torch.testing.assert_close(p, q)


def test_removed_handle() -> None:
    model = Net()
    optimizer = GaLoreAdamW(parameters(model), rank=4)
    handle = step_in_backward(optimizer)
    with pytest.raises(ValueError, match="already"):
        step_in_backward(optimizer)
    handle.remove()
    model(batches(1)[0]).backward()
    assert model.up.weight.grad is not None and not optimizer.state
    step_in_backward(optimizer).remove()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"accumulate": 0}, "Invalid accumulate: 0"),
        ({"max_norm": -1.0}, "Invalid max_norm: -1.0"),
        ({"clip_by": "global"}, "known only after the first ones are used"),
        ({"clip_by": "step"}, "Invalid clip_by: 'step'"),
        ({"sum_dtype": torch.float16}, "Invalid sum_dtype"),
    ],
)
def test_arguments(kwargs: dict[str, Any], message: str) -> None:
    optimizer = FiraAdamW(Net().parameters(), rank=4)
    with pytest.raises(ValueError, match=message):
        step_in_backward(optimizer, **kwargs)
    step_in_backward(optimizer).remove()


def test_optimizers_of_other_packages_are_refused() -> None:
    with pytest.raises(TypeError, match="AdamW cannot update one parameter at a time"):
        step_in_backward(torch.optim.AdamW(Net().parameters()))  # type: ignore[arg-type]
