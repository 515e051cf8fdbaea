"""Which parameters are compressed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, low_rank_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(16, 16)
        self.mlp = nn.Linear(16, 24, bias=False)
        self.input_layernorm = nn.LayerNorm(16)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


LOW = [f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn", "mlp")]


def compressed(optimizer: GaLoreAdamW) -> list[str]:
    return [row.name for row in optimizer.explain() if row.method == "rank 4"]


@pytest.mark.parametrize("tied", [False, True])
def test_names_keep_embeddings_head_norms_and_biases_full_rank(tied: bool) -> None:
    model = Model(tied)
    by_names = GaLoreAdamW(model.named_parameters(), rank=4)
    by_targets = GaLoreAdamW(low_rank_groups(model, rank=4))
    assert compressed(by_names) == compressed(by_targets) == LOW
    for optimizer in (by_names, by_targets):
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    reasons = {row.name: row.reason for row in by_targets.explain()}
    assert reasons["embed_tokens.weight"] == "its group has no rank"


def test_flat_tensors_compress_every_matrix() -> None:
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=4)
    assert [row.shape for row in optimizer.explain() if row.method == "rank 4"] == [
        tuple(p.shape) for p in model.parameters() if p.ndim == 2
    ]


def test_published_groups_work_unchanged() -> None:
    model = Model()
    low = [p for name, p in model.named_parameters() if name in LOW]
    rest = [p for name, p in model.named_parameters() if name not in LOW]
    optimizer = GaLoreAdamW(
        [{"params": rest}, {"params": low, "rank": 4, "update_proj_gap": 7, "scale": 0.5, "proj_type": "std"}], lr=0.1
    )
    assert optimizer.param_groups[0]["rank"] is None
    assert len(compressed(optimizer)) == len(LOW)
    assert optimizer.param_groups[1]["scale"] == 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(16, 16))]})
    assert len(compressed(optimizer)) == len(LOW)


def test_groups_that_name_no_rank_take_the_constructors() -> None:
    model = Model()
    groups = [{"params": list(model.layers.parameters()), "lr": 0.1}, {"params": [model.lm_head.weight]}]
    optimizer = GaLoreAdamW(groups, rank=4)
    assert [group["rank"] for group in optimizer.param_groups] == [4, 4]


def test_rank_none_is_full_rank() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compressed(GaLoreAdamW(Model().parameters(), rank=None)) == []


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("mlp", LOW[1::2]),
        (["self_attn"], LOW[::2]),
        ([r"layers\.0\..*"], LOW[:2]),
        ("all", LOW),
    ],
)
def test_targets(targets: str | list[str], expected: list[str]) -> None:
    groups = low_rank_groups(Model(), targets=targets, rank=4)
    assert groups[0]["param_names"] == expected


def test_a_target_without_a_match_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Invalid targets: \['atn'\] match no matrix; candidates: layers.0.self_attn"):
        low_rank_groups(Model(), targets=["mlp", "atn"])


def test_frozen_parameters_are_in_no_group() -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    assert low_rank_groups(model)[0]["param_names"] == LOW[2:]


def test_bad_params() -> None:
    with pytest.raises(ValueError, match="Invalid params: empty"):
        GaLoreAdamW([])
    with pytest.raises(TypeError, match="got Parameter"):
        GaLoreAdamW(nn.Parameter(torch.zeros(3, 3)))
