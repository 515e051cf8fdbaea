from __future__ import annotations

import math

import pytest
import torch

from lowrank_optim.pretrain.schedule import build_schedule, factor


def published(step: int, warmup: int, total: int) -> float:
    """The harness's function of its 0-based scheduler step, for one cycle."""
    if step < warmup:
        return step / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def test_equals_the_published_one_an_update_later() -> None:
    for update in range(100):
        assert factor(update, 10, 100) == pytest.approx(published(update + 1, 10, 100))


def test_first_last_and_beyond() -> None:
    assert factor(0, 10, 100) == 0.1
    assert factor(9, 10, 100) == 1.0
    assert factor(99, 10, 100) == pytest.approx(0.1)
    assert factor(500, 10, 100) == pytest.approx(0.1)
    assert factor(0, 0, 1) == pytest.approx(0.1)
    assert factor(0, 1, 1) == 1.0


def test_the_optimizer_gets_it() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(optimizer, warmup=2, total=4)
    used = []
    for _ in range(4):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([1.0, 2.0, 1.1, 0.2])


def test_warmup_beyond_the_run() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="Invalid warmup_steps: 5"):
        build_schedule(optimizer, warmup=5, total=4)
