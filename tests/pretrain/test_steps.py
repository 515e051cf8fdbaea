from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank_optim.optim.sharding import part_of
from lowrank_optim.pretrain.batches import Batch
from lowrank_optim.pretrain.llama import build_config, build_model
from lowrank_optim.pretrain.steps import clip_gradients_, evaluate, loss_sum


def make_batches() -> list[Batch]:
    ids = torch.randint(0, 320, (10, 12))
    labels = ids.clone()
    for row in range(10):
        labels[row, 3 + row :] = -100
    return [Batch(ids[i : i + size], labels[i : i + size]) for i, size in ((0, 4), (4, 4), (8, 2))]


def test_loss_equals_transformers(tiny_model: Path) -> None:
    model = build_model(build_config(str(tiny_model)))
    for batch in make_batches():
        expected = model(input_ids=batch.ids, labels=batch.labels).loss * batch.targets
        assert loss_sum(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_is_the_mean_over_tokens(tiny_model: Path) -> None:
    model = build_model(build_config(str(tiny_model))).train()
    batches = make_batches()
    cpu = torch.device("cpu")
    sums = [loss_sum(model, batch).item() for batch in batches]
    counts = [batch.targets for batch in batches]
    result = evaluate(model, iter(batches), limit=0, legacy=False, device=cpu)
    assert result.loss == pytest.approx(sum(sums) / sum(counts))
    assert result.tokens == sum(counts)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert model.training
    limited = evaluate(model, iter(batches), limit=2, legacy=False, device=cpu)
    assert limited.loss == pytest.approx(sum(sums[:2]) / sum(counts[:2]))
    legacy = evaluate(model, iter(batches), limit=0, legacy=True, device=cpu)
    assert legacy.loss == pytest.approx(sum(s / n for s, n in zip(sums, counts)) / 4)
    # Two processes with unequal shares agree with one.
    other = torch.tensor([sums[2], counts[2], sums[2] / counts[2], 1, 0], dtype=torch.float64)
    both = evaluate(model, iter(batches[:2]), limit=0, legacy=False, device=cpu, reduce=lambda t: t + other)
    assert both.loss == pytest.approx(result.loss)


def test_an_evaluation_that_is_stopped(tiny_model: Path) -> None:
    model = build_model(build_config(str(tiny_model))).train()
    batches, cpu = make_batches(), torch.device("cpu")
    asked = iter((False, False, True))
    assert evaluate(model, iter(batches), limit=0, legacy=False, device=cpu, stopping=lambda: next(asked)).stopped
    # On another process.
    other = torch.tensor([0, 0, 0, 0, 1], dtype=torch.float64)
    assert evaluate(model, iter(batches), limit=0, legacy=False, device=cpu, reduce=lambda t: t + other).stopped
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping(dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.zeros(5, 3, dtype=dtype)) for _ in range(3)]
    for weight in weights[:2]:
        weight.grad = torch.randn(5, 3).to(dtype)
    exact = torch.cat([w.grad.flatten() for w in weights[:2] if w.grad is not None]).double().norm().item()
    assert clip_gradients_(weights, 0.0).item() == pytest.approx(exact, rel=1e-5)
    assert clip_gradients_(weights, 0.5).item() == pytest.approx(exact, rel=1e-5)
    assert clip_gradients_(weights, 9.0).item() == pytest.approx(0.5, rel=1e-2)
    weights[0].grad[0, 0] = math.inf  # type: ignore[index]
    assert clip_gradients_(weights, 0.5).item() == math.inf
    assert clip_gradients_(weights[2:], 0.5).item() == 0.0


def test_clipping_where_some_parameters_are_not_split() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
        for weight, value in zip(weights, (1.0, 2.0, 4.0), strict=True):
            weight.grad = torch.full((2, 3), value)
        # The first and the last are ignored by fully_shard.
        split = torch.nn.Parameter(distribute_tensor(weights[1].data, init_device_mesh("cpu", (1,)), [Shard(0)]))
        split.grad = part_of(torch.full((2, 3), 2.0), split)
        weights[1] = split
        assert clip_gradients_(weights, 1.0).item() == pytest.approx(math.sqrt(6 * 21))
        assert clip_gradients_(weights, 0.0).item() == pytest.approx(1.0)
    finally:
        dist.destroy_process_group()
