"""What is particular to Muon."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import Muon, low_rank_groups
from lowrank_optim.ops.blockwise import dequantize, quantize_
from lowrank_optim.ops.newton_schulz import newton_schulz
from tests.reference import muon as reference
from tests.temporaries import CountTemporaries

SHAPES = [(14, 9), (9, 14)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def step_with(optimizer: torch.optim.Optimizer, p: nn.Parameter, grad: Tensor) -> None:
    p.grad = grad
    optimizer.step()


@every_shape
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scaling", ["kj", "kimi"])
def test_the_formulas_in_double_precision(shape: tuple[int, int], nesterov: bool, scaling: str) -> None:
    weight, *grads = torch.randn(9, *shape, dtype=torch.float64)
    scale = math.sqrt(max(1, shape[0] / shape[1])) if scaling == "kj" else 0.2 * math.sqrt(max(shape))
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    expected = reference.muon(weight, grads, scale=scale, steps=4, **options)
    p = nn.Parameter(weight.clone())
    optimizer = Muon([p], scaling=scaling, ns_steps=4, **options)
    for grad, after in zip(grads, expected, strict=True):
        step_with(optimizer, p, grad)
        torch.testing.assert_close(p.detach(), after, rtol=0, atol=1e-12)


@needs_muon
@every_shape
@pytest.mark.parametrize(("scaling", "name"), [("kj", "original"), ("kimi", "match_rms_adamw")])
def test_it_is_torchs_but_for_the_precision_of_the_iteration(
    shape: tuple[int, int], scaling: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def iterate(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return reference.newton_schulz(grad.double(), steps).to(grad.dtype)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iterate)
    params = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        Muon(params[:1], scaling=scaling, **options),
        torch.optim.Muon(params[1:], adjust_lr_fn=name, **options),
    ]
    for _ in range(6):
        grad = torch.randn(shape)
        for p, optimizer in zip(params, optimizers):
            step_with(optimizer, p, grad.clone())
    torch.testing.assert_close(*params, rtol=0, atol=1e-6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attn = nn.Linear(12, 12)
        self.mlp = nn.Linear(12, 30, bias=False)
        self.head = nn.Linear(30, 20, bias=False)


@needs_muon
def test_a_model_trains_as_with_torchs_muon_and_adamw() -> None:
    """With torch's own iteration, in bfloat16: an update is 1e-3, of which 2^-8 may be rounded away."""
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    names = ["attn.weight", "mlp.weight"]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(low_rank_groups(ours), lr=1e-3),
        torch.optim.Muon([theirs.get_parameter(n) for n in names], lr=1e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for n, p in theirs.named_parameters() if n not in names], lr=1e-3, weight_decay=0.1),
    ]
    for _ in range(4):
        for name, p in ours.named_parameters():
            p.grad = torch.randn_like(p)
            theirs.get_parameter(name).grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, p in ours.named_parameters():
        atol = 1e-4 if name in names else 1e-6
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=0, atol=atol)


def test_an_orthonormal_gradient_is_scaled_by_the_polynomial() -> None:
    basis = torch.linalg.qr(torch.randn(128, 64, dtype=torch.float64)).Q
    value = 1 / 8
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    assert value == pytest.approx(0.688, abs=1e-3)
    torch.testing.assert_close(newton_schulz(basis), value * basis, rtol=1e-6, atol=1e-7)


def test_rotations_of_both_sides_turn_the_update_along_and_its_scale_does_not_matter() -> None:
    left, right = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (14, 9))
    grads = torch.randn(3, 14, 9, dtype=torch.float64)
    moved = []
    for change in (lambda g: g, lambda g: left @ g @ right, lambda g: 1e3 * g):
        p = nn.Parameter(torch.zeros(14, 9, dtype=torch.float64))
        optimizer = Muon([p], lr=1.0)
        for grad in grads:
            step_with(optimizer, p, change(grad))
        moved.append(p.detach())
    torch.testing.assert_close(left @ moved[0] @ right, moved[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved[0], moved[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("state_dtype", "bytes_per_value"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 256)])
def test_the_momentum_is_the_only_state(state_dtype: str, bytes_per_value: float) -> None:
    p = nn.Parameter(torch.zeros(128, 64))
    state = Muon([p], state_dtype=state_dtype).init_state(p, {**Muon([p]).param_groups[0], "state_dtype": state_dtype})
    found = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    assert found == p.numel() * bytes_per_value


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_momentum_and_iteration_make_two_full_size_tensors_each(shape: tuple[int, int], device: str) -> None:
    """The mean, it over its norm, and two products; torch's makes seven."""
    p = nn.Parameter(torch.ones(shape, device=device))
    optimizer = Muon([p], weight_decay=0.1)
    p.grad = torch.ones(shape, device=device)
    optimizer.init_state(p, optimizer.param_groups[0])
    with CountTemporaries(p.numel()) as count:
        optimizer.step()
    # Where the host does not look, the verdict masks what is orthogonalised.
    assert len(count.created) == (4 if device == "cpu" else 5), count.created


@pytest.mark.parametrize(("state_dtype", "bound"), [("bfloat16", 0.02), ("int8", 0.1)])
def test_fewer_bits_change_the_direction_a_little(state_dtype: str, bound: float) -> None:
    """The momentum is rounded for the next step; that of the present one is orthogonalised as it is."""
    grads, moved = torch.randn(8, 128, 64), []
    for dtype in ("float32", state_dtype):
        p = nn.Parameter(torch.zeros(128, 64))
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, state_dtype=dtype)
        step_with(optimizer, p, grads[0])
        moved.append(p.detach().clone())
        for grad in grads[1:]:
            step_with(optimizer, p, grad)
        moved.append(p.detach().clone())
    assert torch.equal(moved[0], moved[2])
    assert 0 < float((moved[1] - moved[3]).norm() / moved[1].norm()) < bound


def test_a_momentum_of_codes_survives_in_8_bits() -> None:
    codes, scale = torch.zeros(64, 128, dtype=torch.uint8), torch.zeros(32)
    values = torch.randn(64, 128)
    # The map has a code for the largest value of a block and none for its negative.
    values.view(-1, 256)[:, 0] = 6.0
    quantize_(codes, scale, values, signed=True)
    momentum = dequantize(codes, scale, signed=True)
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = Muon([p], momentum=0.0, state_dtype="int8")
    step_with(optimizer, p, momentum)
    state = optimizer.state[p]
    assert torch.equal(dequantize(state["momentum.codes"], state["momentum.scale"], signed=True), momentum)


def test_a_zero_gradient_is_no_division_by_zero_and_the_gradient_is_left_alone() -> None:
    p = nn.Parameter(torch.ones(14, 9))
    optimizer = Muon([p], weight_decay=0.0)
    step_with(optimizer, p, torch.zeros(14, 9))
    assert torch.equal(p, torch.ones(14, 9))
    grad = torch.randn(14, 9)
    kept = copy.deepcopy(grad)
    step_with(optimizer, p, grad)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": 1.0}, r"Invalid momentum: 1.0, expected a number in \[0, 1\)"),
        ({"nesterov": 2}, "Invalid nesterov: 2, expected one of True, False"),
        (
            {"state_dtype": "int4"},
            "Invalid state_dtype: 'int4' for a momentum that is orthogonalised",
        ),
        ({"ns_steps": 0}, "Invalid ns_steps: 0, expected a positive int"),
        ({"scaling": "original"}, "Invalid scaling: 'original', expected one of 'kj', 'dion', 'kimi', 'none'"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(8, 8))], **kwargs)


def test_adamws_moments_may_have_4_bits() -> None:
    p, embedding = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(64, 128))
    optimizer = Muon([{"params": [p]}, {"params": [embedding], "rank": None, "state_dtype": "int4"}])
    assert "exp_avg.nibbles" in optimizer.init_state(embedding, optimizer.param_groups[1])
