"""What is particular to moments in fewer bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim.ops import int8_blocks
from lowrank_optim.optim.parts import Slot
from lowrank_optim.optim.state_storage import load_moment, moment_slots, recoded, scale_slot

LARGE = (300, 40)


def run(state_dtype: str, grads: list[Tensor], **kwargs: object) -> tuple[nn.Parameter, GaLoreAdamW]:
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = GaLoreAdamW([p], lr=0.01, state_dtype=state_dtype, **{"rank": None, **kwargs})
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("state_dtype", "size"), [("float32", 8), ("bfloat16", 4), ("int8", 2 + 8 / 256), ("int4", 1 + 8 / 128)]
)
@pytest.mark.parametrize("rank", [None, 32])
def test_bytes_of_the_moments(state_dtype: str, size: float, rank: int | None) -> None:
    _, optimizer = run(state_dtype, [torch.randn(256, 64)], rank=rank)
    (state,) = optimizer.state.values()
    moments = [v for k, v in state.items() if k.startswith("exp_avg")]
    assert sum(v.numel() * v.element_size() for v in moments) == 256 * (rank or 64) * size


@pytest.mark.parametrize("rank", [None, 13])
def test_small_moments_stay_fp32_and_are_updated(rank: int | None) -> None:
    """bitsandbytes 0.50 with positional arguments froze exactly these: 300 * 13 = 3900 values."""
    shape = (300, 40) if rank else (300, 13)
    grads = [torch.randn(shape) for _ in range(5)]
    p, optimizer = run("int8", grads, rank=rank)
    q, _ = run("float32", grads, rank=rank)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(p, q) and bool((p != 0).all())


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.06), ("int4", 0.3)])
@pytest.mark.parametrize("rank", [None, 20])
def test_the_trajectory_stays_near_that_of_fp32(state_dtype: str, tolerance: float, rank: int | None) -> None:
    signal = torch.randn(LARGE)
    grads = [signal + torch.randn(LARGE) for _ in range(60)]
    exact, _ = run("float32", grads, rank=rank)
    coarse, _ = run(state_dtype, grads, rank=rank)
    assert 0 < float(((exact - coarse).norm() / exact.norm()).detach()) < tolerance


def test_a_bfloat16_second_moment_decays() -> None:
    """Rounded to nearest it stands still: 0.999 of a bfloat16 number is nearer to the number than to the next."""
    grads = [torch.ones(LARGE), *(torch.full(LARGE, 1e-4) for _ in range(1000))]
    p, optimizer = run("bfloat16", grads)
    expected = 0.001 * 0.999**1000
    second = optimizer.state[p]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert float(second.float().mean()) == pytest.approx(expected, rel=0.02)


def test_every_tensor_and_parameter_has_bits_of_its_own() -> None:
    params = [nn.Parameter(torch.zeros(LARGE)) for _ in range(2)]
    optimizer = GaLoreAdamW(params, rank=None, state_dtype="bfloat16", betas=(0.9, 0.9))
    grad = torch.full(LARGE, 1.003)
    for p in params:
        p.grad = grad
    optimizer.step()
    first, second = (optimizer.state[p] for p in params)
    assert not torch.equal(first["exp_avg"], second["exp_avg"])
    up = [state[key] > state[key].min() for state in (first, second) for key in ("exp_avg", "exp_avg_sq")]
    assert all(not torch.equal(a, b) for i, a in enumerate(up) for b in up[:i])


def test_a_group_may_differ_from_the_constructor() -> None:
    p, q = (nn.Parameter(torch.zeros(LARGE)) for _ in range(2))
    groups = [{"params": [p], "state_dtype": "float32"}, {"params": [q]}]
    optimizer = GaLoreAdamW(groups, rank=None, state_dtype="int8")
    p.grad = q.grad = torch.randn(LARGE)
    optimizer.step()
    assert "exp_avg" in optimizer.state[p] and "exp_avg.codes" in optimizer.state[q]
    torch.testing.assert_close(
        load_moment(optimizer.state[q], "exp_avg", torch.float32), optimizer.state[p]["exp_avg"], rtol=0.2, atol=5e-3
    )


def test_a_second_moment_of_4_bits_decays_and_stays_positive() -> None:
    """Rounded to nearest it stands still; every fourth gradient stays, so that the scales do too."""
    grads = [torch.ones(LARGE)] + 800 * [torch.full(LARGE, 0.1)]
    for grad in grads:
        grad[:, ::4] = 1
    p, optimizer = run("int4", grads, betas=(0.9, 0.99))
    second = load_moment(optimizer.state[p], "exp_avg_sq", torch.float32)
    assert float(second[:, ::4].mean()) == pytest.approx(1, rel=0.02)
    rest = second[:, torch.arange(40) % 4 != 0]
    assert float(rest.mean()) == pytest.approx(0.01, rel=0.1)
    assert bool((rest > 0).all())


def test_odd_rows_have_8_bits_and_4_bits_have_no_kernel() -> None:
    p, optimizer = run("int4", [torch.randn(301, 43)])
    assert optimizer.state[p]["exp_avg.codes"].shape == (301, 43)
    p, optimizer = run("int4", [torch.randn(301, 42)])
    assert optimizer.state[p]["exp_avg.nibbles"].shape == (301, 21)
    with pytest.raises(ValueError, match="Invalid backend: 'triton' with state_dtype='int4'"):
        run("int4", [torch.randn(LARGE)], backend="triton")


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_planned_state_is_real_state(state_dtype: str) -> None:
    shapes = [(300, 40), (40, 300), (16, 12, 3, 3), (5000,), (7,)]
    meta = [nn.Parameter(torch.empty(s, device="meta", dtype=torch.bfloat16)) for s in shapes]
    real = [nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in shapes]
    kwargs = {"rank": 20, "state_dtype": state_dtype, "weight_rounding": "compensated"}
    planned, stepped = (GaLoreAdamW(params, **kwargs) for params in (meta, real))
    for p, q in zip(meta, real):
        q.grad = torch.randn(q.shape).bfloat16()
        stepped.step()
        state = planned.init_state(p, planned.param_groups[0])
        tensors = {k: (v.shape, v.dtype) for k, v in state.items() if isinstance(v, Tensor)}
        assert tensors == {k: (v.shape, v.dtype) for k, v in stepped.state[q].items() if isinstance(v, Tensor)}
        assert all(v.is_meta for v in state.values() if isinstance(v, Tensor))


def test_an_unknown_state_dtype_is_named() -> None:
    with pytest.raises(
        ValueError, match="Invalid state_dtype: 'fp8', expected one of 'float32', 'bfloat16', 'int8', 'int4'"
    ):
        GaLoreAdamW([nn.Parameter(torch.zeros(LARGE))], state_dtype="fp8")


def test_the_blocks_of_linear_codes_end_where_rows_do() -> None:
    # 15 rows of 257 values, in blocks of 256 of all values or of 128 of a row.
    assert scale_slot(Slot((3, 5, 257), torch.uint8)).shape == (16,)
    assert scale_slot(Slot((3, 5, 257), torch.int8)).shape == (45,)


def test_values_of_another_shape_are_not_made_codes() -> None:
    """Loading then says what is wrong."""
    slots = moment_slots("exp_avg", (128, 64), torch.float32, "int8", None)
    saved = {"exp_avg": torch.ones(64, 128)}
    assert recoded(saved, slots) == saved
    assert recoded({"exp_avg": torch.ones(128, 64)}, slots).keys() == slots.keys()


def test_an_error_that_was_decoded_becomes_its_codes_again() -> None:
    error = torch.randn(16, 300)
    codes, scale = torch.zeros(16, 300, dtype=torch.int8), torch.zeros(48)
    int8_blocks.quantize_(codes, scale, error)
    slots = {"error.codes": Slot((16, 300), torch.int8), "error.scale": Slot((48,), torch.float32)}
    found = recoded({"error": int8_blocks.dequantize(codes, scale, torch.float32)}, slots)
    assert found.keys() == slots.keys() and torch.equal(found["error.codes"], codes)
    torch.testing.assert_close(found["error.scale"], scale)


def test_codes_of_another_shape_are_not_decoded() -> None:
    slots = moment_slots("exp_avg", (64, 128), torch.float32, "float32", None)
    saved = {
        key: torch.zeros(slot.shape, dtype=slot.dtype)
        for key, slot in moment_slots("exp_avg", (128, 64), torch.float32, "int8", None).items()
        if isinstance(slot, Slot)
    }
    assert recoded(saved, slots) == saved
    other = moment_slots("exp_avg", (128, 64), torch.float32, "float32", None)
    assert recoded(saved, other).keys() == {"exp_avg"}
