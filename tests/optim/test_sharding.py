"""What a parameter that is split over processes asks of its layout, without other processes.

``tests/distributed`` runs the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_optim import Alice, FiraAdamW, GaLoreAdamW
from lowrank_optim.ops.rounding import Positions
from lowrank_optim.optim import sharding
from lowrank_optim.optim.parts import Slot
from lowrank_optim.optim.sharding import Layout, Shards, agree, room_for, shards_of, whole
from lowrank_optim.optim.state_storage import decode, position


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(mesh: DeviceMesh, *values: float, placement: Any = None) -> tuple[nn.Parameter, Tensor]:
    grad = distribute_tensor(torch.tensor(values).view(-1, 1), mesh, [placement or Shard(0)])
    return nn.Parameter(torch.zeros_like(grad)), grad


def layout(kind: str, axis: int = 0, kept: str | None = "rows") -> Layout:
    """The second half of 16."""
    return Layout(Shards(axis, 8, 16, 16, None, None, ()), kind, kept=kept)


@pytest.mark.parametrize("looks", [True, False])
def test_a_verdict_is_read_only_where_the_host_looks(
    mesh: DeviceMesh, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_optim.optim.finite.host_looks", lambda device: looks)
    monkeypatch.setattr(sharding, "host_looks", lambda device: looks)
    good, bad = split(mesh, 1.0, 2.0), split(mesh, 1.0, torch.nan)
    found = agree([good, bad])
    assert all(isinstance(found[p], Tensor) is not looks for p, _ in (good, bad))
    assert torch.tensor(float(found[good[0]])).isfinite() and bool(found[good[0]])
    assert (found[bad[0]] is False) if looks else bool(torch.as_tensor(found[bad[0]]).isnan())


def test_what_processes_tell_each_other_of_a_gradient_is_whether_it_is_finite() -> None:
    device = torch.device("cpu")
    for ok, finite in ((True, True), (False, False), (torch.tensor(7.0), True), (torch.tensor(torch.inf), False)):
        assert sharding._flag(ok, device).item() is finite
    assert sharding._flag(torch.tensor([1.0, torch.nan]), device).item() is False


def test_what_every_process_holds_whole_needs_no_message(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **_: sent.append(args))
    param, grad = split(mesh, 1.0, torch.inf, placement=Replicate())
    assert agree([(param, grad)]) == {param: False} and not sent
    agree([split(mesh, 1.0)])
    assert len(sent) == 1


def test_a_split_parameter_without_a_gradient_stays(mesh: DeviceMesh) -> None:
    (moved, grad), (frozen, _) = split(mesh, 1.0, 2.0), split(mesh, 3.0)
    optimizer = GaLoreAdamW([moved, frozen], rank=None)
    moved.grad = grad
    optimizer.step()
    assert sharding.whole(moved).ne(0).all() and sharding.whole(frozen).eq(0).all() and frozen not in optimizer.state


def test_shapes_of_wholes_and_parts() -> None:
    part, state = torch.zeros(5, 8), {"side": 16}
    rows, columns, whole = (layout(kind) for kind in ("rows", "columns", "whole"))
    assert rows.like(part, state) is part and whole.like(part, state) is part
    like = columns.like(part, state)
    assert like.shape == (5, 16) and like.untyped_storage().nbytes() == 4
    assert columns.like(part.expand(3, 5, 8), state).shape == (3, 5, 16)
    assert rows.shape(torch.Size((3, 8, 5))) == (3, 16, 5)
    assert columns.shape(like.shape) == (5, 16) and whole.shape(part.shape) == (5, 8)


@pytest.mark.parametrize("kind", ["rows", "elements", "whole"])
def test_eight_bit_moments_of_a_whole_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the whole do not begin where those of a part do."""
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(16, 9))
    optimizer = GaLoreAdamW([param], rank=None if kind == "elements" else 3, state_dtype="int8")
    param.grad = torch.randn(16, 9)
    optimizer.step()
    state, slots = optimizer.state[param], optimizer.slots_of(param, optimizer.param_groups[0])
    part = layout(kind).unwrap(state, slots)
    if kind == "whole":
        assert part.keys() == state.keys() and torch.equal(part["exp_avg.codes"], state["exp_avg.codes"])
        return
    assert "exp_avg.codes" not in part and "exp_avg.scale" not in part
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(part[key], decode(state, key)[8:])


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_other_lengths_are_gathered(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows on two processes; this is the second."""
    whole = torch.randn(3, 4).bfloat16().movedim(0, axis)
    parts = whole.split(2, axis)

    def gather(out: Tensor, sent: Tensor, group: Any) -> None:
        first = parts[0].movedim(axis, 0).contiguous().view(-1).view(torch.uint8)
        out.copy_(torch.cat((first, sent)))

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    group: Any = object()
    found = Shards(0, 2, 3, 3, group, None, ()).gather(parts[1], axis)
    assert torch.equal(found, whole)
    assert Shards(0, 0, 1, 1, None, None, ()).gather(parts[1], axis) is parts[1]


@pytest.mark.parametrize(
    ("shape", "axis", "rank", "split", "from_end"),
    [
        ((16, 7), 0, 4, "rows", -2),
        ((16, 7), 1, 4, "columns", -1),
        ((7, 16), 1, 4, "rows", -1),
        ((7, 16), 0, 4, "columns", -2),
        ((16, 7), 0, None, "elements", -2),
        ((16, 7), 1, None, "elements", -1),
        ((16, 7, 3, 3), 0, 4, "whole", -1),
    ],
)
def test_how_a_parameter_is_split(
    shape: tuple[int, ...], axis: int, rank: int | None, split: str, from_end: int
) -> None:
    optimizer = GaLoreAdamW([param := nn.Parameter(torch.zeros(shape))], rank=rank)
    group: Any = object()
    shards = Shards(axis, 8, 16, 16, group, None, ())
    found = optimizer.split(param, optimizer.param_groups[0], shards)[-1]
    assert (found.split, found.from_end) == (split, from_end)


def test_only_shards_along_one_axis_of_the_mesh(mesh: DeviceMesh) -> None:
    for placement in (Partial(), _StridedShard(0, split_factor=1)):
        param = DTensor.from_local(torch.zeros(4, 2), mesh, [placement], run_check=False)
        with pytest.raises(ValueError, match=r"Invalid placements: .*shape \(4, 2\), expected Shard\(dim\)"):
            shards_of(param)
    assert shards_of(split(mesh, 1.0, 2.0)[1]).stop == 2


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_a_state_is_saved_as_what_its_parameter_is(
    mesh: DeviceMesh, state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_optim.optim.state_storage.MIN_8BIT_SIZE", 16)
    grad = distribute_tensor(torch.randn(16, 9), mesh, [Shard(0)])
    param = nn.Parameter(torch.zeros_like(grad))
    optimizer = GaLoreAdamW([param], rank=3, state_dtype=state_dtype)
    assert not optimizer.accumulates(param, optimizer.param_groups[0])
    param.grad = grad
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    kept = {key: value.placements for key, value in state.items() if isinstance(value, DTensor)}
    assert kept == {"exp_avg": (Shard(0),), "exp_avg_sq": (Shard(0),), "basis": (Replicate(),)}
    before = {key: whole(value) for key, value in state.items() if isinstance(value, DTensor)}
    optimizer.load_state_dict(optimizer.state_dict())
    (again,) = optimizer.state_dict()["state"].values()
    for key, value in before.items():
        torch.testing.assert_close(whole(again[key]), value)


def test_one_number_of_a_state_is_saved_as_it_is(mesh: DeviceMesh) -> None:
    grad = distribute_tensor(torch.randn(16, 9), mesh, [Shard(0)])
    optimizer = FiraAdamW([param := nn.Parameter(torch.zeros_like(grad))], rank=3)
    param.grad = grad
    optimizer.step()
    norm = optimizer.state_dict()["state"][0]["update_norm"]
    assert norm.ndim == 0 and norm > 0 and not isinstance(norm, DTensor)


def test_room_for_a_state(mesh: DeviceMesh) -> None:
    param = nn.Parameter(distribute_tensor(torch.zeros(16, 9), mesh, [Shard(0)]))
    for shape, placements in (((16, 9), Shard(0)), ((3, 16), Shard(1)), ((16,), Shard(0)), ((9, 3), None)):
        room = room_for(torch.empty(shape, device="meta"), param)
        assert room.shape == shape and getattr(room, "placements", (None,)) == (placements,)


def test_where_a_part_stands_in_the_counter_of_random_bits() -> None:
    rows = {"axis": -2, "length": 16, "first": 8, "left": False}
    assert position(rows, torch.zeros(8, 5), weight=True) == 40
    # Something of the state has the rows of an oriented gradient.
    assert position(rows, torch.zeros(8, 3)) == 24
    turned = {**rows, "axis": -1, "left": True}
    assert position(turned, torch.zeros(5, 8), weight=True) == Positions(8, 8, 8)
    assert position(turned, torch.zeros(8, 3)) == 24
    # The compressed axis is split, and the state whole.
    assert position({**turned, "axis": -2}, torch.zeros(16, 3)) == 0
    assert position({**rows, "axis": -1}, torch.zeros(16, 3)) == 0


@pytest.mark.parametrize(("shape", "along"), [((12, 7), "rows"), ((7, 12), "columns"), ((2, 7, 12), "columns")])
def test_the_energy_outside_of_a_subspace_runs_along_the_rows_of_a_gradient(shape: tuple[int, ...], along: str) -> None:
    optimizer = Alice([param := nn.Parameter(torch.zeros(shape))], rank=4)
    slot = optimizer.slots_of(param, optimizer.param_groups[0])["outside"]
    assert isinstance(slot, Slot) and slot.along == along
