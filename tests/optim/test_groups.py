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
    assert reasons["embed_tokens.weight"] == "embedding"


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


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.blocks[0].conv = nn.Conv1d(16, 16, 3)
        self.blocks[0].router = nn.Linear(16, 8)


def test_convolutions_are_taken_where_a_target_names_them() -> None:
    hidden = ["blocks.0.self_attn.weight", "blocks.0.mlp.weight"]
    for everything in (None, "all"):
        groups = low_rank_groups(Convolutions(), targets=everything, rank=4)
        assert groups[0]["param_names"] == hidden
    for targets in ("conv", r".*\.conv\.weight"):
        groups = low_rank_groups(Convolutions(), targets=targets, rank=4)
        assert groups[0]["param_names"] == ["blocks.0.conv.weight"]
        assert groups[0]["param_roles"] == ["convolution"]


@pytest.mark.parametrize("target", ["router", "layernorm", r".*\.bias"])
def test_what_stays_full_rank_stays_so_when_it_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=r"match no matrix; candidates: blocks\.0\.self_attn\.weight"):
        low_rank_groups(Convolutions(), targets=target, rank=4)


def test_every_matrix_is_taken_by_default_whatever_its_name() -> None:
    model = Model()
    model.layers[1].add_module("mixer", nn.Linear(16, 16))
    assert "layers.1.mixer.weight" in low_rank_groups(model)[0]["param_names"]
    published = low_rank_groups(model, targets=("attn", "mlp"))[0]
    assert published["param_names"] == LOW and published["param_roles"] == ["matrix"] * 4
    with pytest.raises(ValueError, match="candidates: none"):
        low_rank_groups(nn.Embedding(40, 16))


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
