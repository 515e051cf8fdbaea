"""Ranks from spectra: what they cost, what they keep, and who takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, allocate_ranks, low_rank_groups
from lowrank_optim.nn import LowRank, SLTrain, compress, convert
from lowrank_optim.nn.lowrank import LowRankLinear
from tests.nn.parameterizations import TARGETS, block, train


def matrix(spectrum: Tensor, rows: int) -> Tensor:
    """A matrix (rows, len(spectrum)) of these singular values."""
    u, _ = torch.linalg.qr(torch.randn(rows, len(spectrum), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))
    return (u * spectrum) @ v.T


def cost(ranks: dict[str, int], source: dict[str, Tensor]) -> int:
    return sum(rank * sum(source[name].shape) for name, rank in ranks.items())


@pytest.mark.parametrize("budget", [1, 2, 5, 11, 16])
def test_the_cost_is_that_of_the_budget_up_to_a_rank(budget: int) -> None:
    torch.manual_seed(0)
    source = {f"{i}.weight": torch.randn(16 + 5 * i, 16) * 10.0**i for i in range(6)}
    ranks = allocate_ranks(source, budget)
    allowed = cost(dict.fromkeys(source, budget), source)
    assert all(1 <= rank <= 16 for rank in ranks.values())
    assert allowed - max(sum(m.shape) for m in source.values()) < cost(ranks, source) <= allowed


def test_of_a_model_stacks_of_experts_are_left_out() -> None:
    model = block()
    model.experts = nn.Parameter(torch.randn(3, 8, 8))
    named = {name for name, p in model.named_parameters() if p.ndim == 2}
    ranks = allocate_ranks(model, 2)
    assert ranks and ranks.keys() <= named


def test_ranks_rise_with_the_budget_and_do_not_depend_on_sizes() -> None:
    torch.manual_seed(0)
    source = {str(i): matrix(torch.linspace(1, 0, 12, dtype=torch.float64) ** (i + 1), 20) for i in range(4)}
    before = dict.fromkeys(source, 0)
    for budget in range(1, 13):
        ranks = allocate_ranks(source, budget)
        assert all(ranks[name] >= before[name] for name in source)
        before = ranks
        scaled = {name: value * 10.0 ** (3 * i) for i, (name, value) in enumerate(source.items())}
        assert allocate_ranks(scaled, budget) == ranks
    ranks = list(allocate_ranks(source, 6).values())
    # The faster the values fall, the lower the rank.
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > 6 > ranks[-1]


def test_a_matrix_of_low_rank_keeps_its_rank_and_equal_spectra_get_equal_ranks() -> None:
    torch.manual_seed(0)
    flat = 1 + 0.01 * torch.rand(12, dtype=torch.float64).sort(descending=True).values
    flat[-1] = 0
    low = torch.tensor([1.0] * 3 + [0.0] * 9, dtype=torch.float64)
    source = {"full": matrix(flat, 12), "low": matrix(low, 12)}
    assert allocate_ranks(source, 7) == {"full": 11, "low": 3}
    same = torch.randn(8, 8)
    assert (
        allocate_ranks({"a": same, "b": same, "c": torch.randn(9, 8)}, 3)["a"]
        == allocate_ranks({"a": same, "b": same, "c": torch.randn(9, 8)}, 3)["b"]
    )
    # Of equal values alone nothing falls off: all of them or, where they cost too much, one.
    assert allocate_ranks({"a": torch.eye(4), "b": torch.eye(4)}, 4) == {"a": 4, "b": 4}
    assert allocate_ranks({"a": torch.zeros(4, 4)}, 2) == {"a": 1}


def test_another_cost() -> None:
    torch.manual_seed(0)
    source = {"square": torch.randn(20, 20), "long": torch.randn(60, 20)}
    ranks = allocate_ranks(source, 5, cost=lambda shape: min(shape) + 2 * max(shape))
    spent = ranks["square"] * 60 + ranks["long"] * 140
    assert 1000 - 140 < spent <= 1000


def test_wrong_sources_are_named() -> None:
    for source, budget, message in [
        ({}, 2, "Invalid source: no matrices"),
        ({"v": torch.ones(3)}, 2, r"Invalid source: 'v' has the shape \(3,\)"),
        ({"m": torch.full((2, 2), torch.nan)}, 2, "Invalid source: 'm' is not finite"),
        ({"m": torch.eye(2)}, 0, "Invalid budget: 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            allocate_ranks(source, budget)


def test_optimizers_take_a_group_a_rank() -> None:
    model = block()
    ranks = allocate_ranks(model, 4)
    assert set(ranks) == {f"{name}.weight" for name in TARGETS}
    ranks = dict(zip(ranks, (2, 3, 3, 5)))
    groups = low_rank_groups(model, rank=ranks, update_proj_gap=5)
    assert [group["rank"] for group in groups] == [2, 3, 5, None]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    losses = train(model, optimizer, 0, 20)
    assert losses[-1] < losses[0]
    found = {row.name: row.method for row in optimizer.explain()}
    assert all(found[name] == f"rank {rank}" for name, rank in ranks.items())
    name = f"{TARGETS[0]}.weight"
    with pytest.raises(ValueError, match=f"Invalid rank: '{name}' has none"):
        low_rank_groups(model, rank={key: rank for key, rank in ranks.items() if key != name})
    with pytest.raises(ValueError, match="Invalid rank: 'other' is not a low-rank parameter"):
        low_rank_groups(model, rank={**ranks, "other": 3})


def test_parameterizations_take_ranks() -> None:
    model = block()
    ranks = {f"{name}.weight": rank for name, rank in zip(TARGETS, (2, 3, 4, 5))}
    convert(model, SLTrain(rank=1), ranks=ranks)
    assert [model.get_submodule(name).A.shape[0] for name in TARGETS] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"Invalid ranks: 'lm_head\.weight' is not the weight of a layer to convert"):
        convert(block(), LowRank(), ranks={"lm_head.weight": 3})
    with pytest.raises(ValueError, match=r"attn\.q_proj: Invalid rank: 13"):
        convert(block(), LowRank(rank=4), ranks={"attn.q_proj.weight": 13})


def test_compressing_keeps_the_nearest_factors_where_they_are_smaller() -> None:
    model, dense = block(), block()
    x = torch.arange(11)[None]
    # 12 x 12: factors of rank 6 are as large.
    ranks = {"attn.q_proj.weight": 6, "attn.o_proj.weight": 5, "mlp.up_proj.weight": 3}
    assert compress(model, ranks) == ["attn.o_proj", "mlp.up_proj"]
    for name, rank in (("attn.o_proj", 5), ("mlp.up_proj", 3)):
        layer, weight = model.get_submodule(name), dense.get_submodule(name).weight.detach()
        assert isinstance(layer, LowRankLinear) and layer.A.shape[0] == rank
        singular = torch.linalg.svdvals(weight)
        error = (layer.dense_weight() - weight).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum())
    assert type(model.attn["q_proj"]) is nn.Linear
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0, 30)
    assert model(x).isfinite().all() and losses[-1] < losses[0]
    for wrong, message in [
        ({"attn.q_proj.weight": 6}, "none makes its layer smaller"),
        ({"lm_head.weight": 2}, "'lm_head.weight' is not the weight of a linear layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(block(), wrong)
