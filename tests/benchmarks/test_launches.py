"""How much a step launches on a GPU, and what it asks of the host, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim.optim.rules.adam import Adam

pytest.importorskip("triton", minversion="3.3")

from benchmarks import launches
from benchmarks.launches import ROWS, Row

# Calls of functions a matrix; two products alone take 3.
CALLS = {"GaLoreAdamW": 82, "GaLoreAdamW8bit": 82, "FiraAdamW": 164, "APOLLOAdamW": 173, "DCTAdamW": 92}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_launches_of_a_step_between_refreshes(row: Row) -> None:
    names, moved, moments = launches.launches(row)
    assert 0 < len(names) <= row.most, names
    if row.rank is None and not row.options:
        values = row.shape[0] * row.shape[1]
        assert moved <= (22 if row.method == "GaLoreAdamW" else 11) * values
        assert moments == (16 * values if row.method == "GaLoreAdamW" else moments)


@pytest.mark.parametrize("row", ROWS[:6], ids=lambda row: row.name)
def test_the_library_projects_a_gradient_of_16_bits_as_it_is(row: Row) -> None:
    """A kernel of its own was bound by the L2 cache, and a product in fp32 would convert the gradient."""
    names = launches.launches(row).names
    assert names.count("mm") == 1 and names.index("mm") == (row.name == "APOLLO") and "_to_copy" not in names


def test_one_launch_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[0]
    names = launches.launches(row).names
    direction = Adam.direction

    def more(self: Adam, low: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return direction(self, low * 1, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Adam, "direction", more)
    assert launches.launches(row).names == [*names[:2], "mul", *names[2:]]


@pytest.mark.parametrize("method", launches.HOST)
def test_what_a_matrix_asks_of_the_host(method: str) -> None:
    """Counted, not timed: a busy machine changes nothing."""
    assert 3 < launches.host_calls(method) <= CALLS[method]


@pytest.mark.parametrize("method", launches.HOST)
def test_a_replayed_step_asks_for_the_addresses_alone(method: str) -> None:
    """Of the weight and its gradient."""
    assert launches.host_calls(method, replayed=True) <= 4


def test_the_host_is_timed_and_everything_is_put_back() -> None:
    assert 0 < launches.floor_seconds(steps=1, matrices=2) < 1
    assert 0 < launches.host_seconds("GaLoreAdamW", steps=1, matrices=2) < 1
    from lowrank_kernels import adam_direction

    from lowrank_optim import GaLoreAdamW

    assert hasattr(adam_direction.adam_direction_kernel, "arg_names")
    p = nn.Parameter(torch.ones(8, 6))
    p.grad = torch.ones_like(p)
    GaLoreAdamW([p], rank=2, lr=0.1).step()
    assert not torch.equal(p, torch.ones(8, 6))
