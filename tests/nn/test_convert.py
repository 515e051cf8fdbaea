from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim.nn import LoRA, LowRank, LowRankLinear, convert, merge, reset_parameters
from tests.nn.parameterizations import TARGETS, block


def test_only_targets_are_replaced() -> None:
    model = block()
    kept = {name: p for name, p in model.named_parameters() if not name.startswith(("attn", "mlp"))}
    assert convert(model, LowRank(rank=3)) == TARGETS
    assert all(isinstance(model.get_submodule(name), LowRankLinear) for name in TARGETS)
    assert all(model.get_parameter(name) is p for name, p in kept.items())


def test_targets_are_parts_of_names_or_regular_expressions() -> None:
    assert convert(block(), LowRank(rank=3), targets="mlp") == TARGETS[2:]
    assert convert(block(), LowRank(rank=3), targets=[r".*\.(q|up)_proj"]) == ["attn.q_proj", "mlp.up_proj"]
    # Embeddings, head and norms stay even then.
    assert convert(block(), LowRank(rank=3), targets="all") == TARGETS


@pytest.mark.parametrize("targets", ["experts", ["attn", "experts"]])
def test_a_target_that_matches_nothing_is_an_error(targets: str | list[str]) -> None:
    model = block()
    with pytest.raises(ValueError, match=r"experts.*candidates: attn\.q_proj"):
        convert(model, LowRank(rank=3), targets=targets)
    assert type(model.attn["q_proj"]) is nn.Linear


def test_converting_twice_is_an_error() -> None:
    model = block()
    convert(model, LowRank(rank=3), targets="attn")
    with pytest.raises(ValueError, match=r"attn\.q_proj.*already a LowRankLinear"):
        convert(model, LowRank(rank=3))
    # What is not converted yet may be, and differently.
    assert convert(model, LoRA(rank=2), targets="mlp") == TARGETS[2:]


def test_an_option_that_does_not_fit_leaves_the_model_alone() -> None:
    model = block()
    with pytest.raises(ValueError, match=r"attn\.q_proj: Invalid rank: 13, expected at most 12"):
        convert(model, LowRank(rank=13))
    assert type(model.attn["q_proj"]) is nn.Linear


def test_from_weight_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="meta"):
        convert(block().to("meta"), LowRank(rank=3), from_weight=True)


def test_a_module_in_two_places_stays_one() -> None:
    model = block()
    model.attn["o_proj"] = model.mlp["extra"] = model.attn["o_proj"]
    assert convert(model, LowRank(rank=3)) == [*TARGETS, "mlp.extra"]
    assert model.attn["o_proj"] is model.mlp["extra"]
    merge(model)
    assert model.attn["o_proj"] is model.mlp["extra"]


def test_modules_that_share_a_weight_become_one() -> None:
    model = block()
    model.attn["k_proj"] = nn.Linear(12, 12, bias=False)
    model.attn["k_proj"].weight = model.attn["o_proj"].weight
    convert(model, LowRank(rank=3))
    assert model.attn["k_proj"] is model.attn["o_proj"]
    # Positions count it once, so that a reset draws what the conversion drew.
    expected = model.state_dict()["mlp.down_proj.A"].clone()
    reset_parameters(model)
    assert torch.equal(model.mlp["down_proj"].A, expected)


@pytest.mark.parametrize("other", ["another bias", "no linear"])
def test_a_weight_shared_with_what_stays_is_an_error(other: str) -> None:
    model = block()
    if other == "another bias":
        model.attn["k_proj"] = nn.Linear(12, 12)
        model.attn["k_proj"].weight = model.attn["o_proj"].weight
    else:
        model.copy = nn.ParameterList([model.attn["o_proj"].weight])
    with pytest.raises(ValueError, match="shares its weight"):
        convert(model, LowRank(rank=3))


def test_heads_and_routers_stay_whatever_their_names() -> None:
    model = block(tokens=12)
    # A linear that computes with an embedding's table is that embedding.
    model.attn["k_proj"] = nn.Linear(12, 12)
    model.attn["k_proj"].weight = model.embed_tokens.weight
    model.moe = nn.ModuleDict(
        {"gate": nn.Linear(12, 3), "experts": nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))}
    )
    assert set(convert(model, LowRank(rank=3))) == {*TARGETS, *(f"moe.experts.{i}" for i in range(3))}
    for target in ("k_proj", "gate", "lm_head"):
        with pytest.raises(ValueError, match=r"match no nn\.Linear"):
            convert(model, LowRank(rank=3), targets=target)


def test_modes_devices_and_dtypes_stay() -> None:
    model = block().to(torch.bfloat16).eval()
    convert(model, LoRA(rank=2, dropout=0.5))
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    merge(model)
    assert not model.attn["q_proj"].training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_subclasses_of_linear_are_left_alone() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="candidates: none"):
        convert(model, LowRank(rank=2), targets="attn")


@pytest.mark.parametrize("call", [merge, reset_parameters])
def test_a_model_without_parameterized_layers_is_an_error(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="holds no parameterized layer"):
        call(block())
