import copy
import sys

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.pretrain.optimizers import (
    accepted_arguments,
    build_optimizer,
    low_rank_names,
    optimizer_names,
    parse_optimizer_args,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(12, 20)
        self.mlp = nn.Linear(20, 12, bias=False)
        self.norm = nn.LayerNorm(12)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.block = Block()
        self.head = nn.Linear(12, 30, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.block.norm(x + self.block.mlp(self.block.attn(x).relu())))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


def backward(model, seed=0):
    tokens = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(-1)).backward()


def names_by_group(optimizer):
    return [set(group["param_names"]) for group in optimizer.param_groups]


def test_parse_optimizer_args():
    pairs = ["rank=128", "lr=1e-3", "betas=(0.9,0.95)", "proj_type=std", "scale=none", "maximize=True", "a = x=y"]
    assert parse_optimizer_args(pairs) == {
        "rank": 128,
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "proj_type": "std",
        "scale": None,
        "maximize": True,
        "a": "x=y",
    }
    assert parse_optimizer_args([]) == {}


@pytest.mark.parametrize("pairs", [["rank"], ["=3"], ["rank="], ["a-b=3"], ["rank=3", "rank=4"]], ids=str)
def test_parse_optimizer_args_refuses(pairs):
    with pytest.raises(ValueError, match="Invalid optimizer argument"):
        parse_optimizer_args(pairs)


def test_names_hold_only_what_a_training_loop_can_use():
    names = optimizer_names()
    # Ours come first, so that a class of torch with the same name would be hidden, not the other way round.
    assert set(low_rank_names()) <= set(names[: names.index("SGD")])
    assert len(names) == len(set(names))
    assert {"GaLoreAdamW", "AdamW", "SGD", "Adafactor"} <= set(names)
    assert not {"Optimizer", "LBFGS", "SparseAdam"} & set(names)


@pytest.mark.parametrize("name", low_rank_names())
def test_ours_split_the_model(model, name):
    ranked = "rank" in accepted_arguments(name)
    optimizer = build_optimizer(name, model, lr=0.01, weight_decay=0.1, args={"rank": 4} if ranked else {})
    assert type(optimizer) is getattr(lowrank_optim, name)
    assert names_by_group(optimizer)[0] == {"block.attn.weight", "block.mlp.weight"}
    assert [group["rank"] for group in optimizer.param_groups] == [4 if ranked else 1, None]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:.*compresses no parameter")
def test_defaults_are_the_class_s_own(model):
    ours = build_optimizer("GaLoreAdamW", model)
    assert ours.param_groups[0]["rank"] == 128
    assert ours.param_groups[0]["lr"] == 1e-3
    adamw = build_optimizer("AdamW", model)
    assert adamw.defaults == torch.optim.AdamW(model.parameters()).defaults


def test_targets(model):
    optimizer = build_optimizer("GaLoreAdamW", model, args={"rank": 4, "targets": "mlp"})
    assert names_by_group(optimizer)[0] == {"block.mlp.weight"}
    with pytest.raises(ValueError, match="Invalid targets"):
        build_optimizer("GaLoreAdamW", model, args={"targets": "experts"})


@pytest.mark.parametrize("name", ["GaLoreAdamW", "AdamW", "SGD", "AdamW8bit"])
def test_frozen_parameters_are_left_out_and_steps_work(model, name):
    if name == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    model.embed.weight.requires_grad_(False)
    optimizer = build_optimizer(name, model, lr=0.1, args={"rank": 4} if name == "GaLoreAdamW" else {})
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters())) - 1
    before = copy.deepcopy(model)
    backward(model)
    optimizer.step()
    for (key, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (key == "embed.weight"), key


def test_ours_go_before_torch(model):
    assert type(build_optimizer("Muon", model)) is lowrank_optim.Muon


def test_torch_goes_before_bitsandbytes(model):
    assert type(build_optimizer("AdamW", model)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "near"), [("GaloreAdamw", "GaLoreAdamW"), ("adamw", "AdamW"), ("Adafactr", "Adafactor")]
)
def test_unknown_name_names_the_nearest(model, name, near):
    with pytest.raises(ValueError, match=f"Invalid optimizer: '{name}'.*did you mean {near}\\?"):
        build_optimizer(name, model)


@pytest.mark.parametrize(
    ("name", "key", "near"),
    [
        ("GaLoreAdamW", "update_proj_gpa", "update_proj_gap"),
        ("AdamW", "beta", "betas"),
        ("SGD", "momentun", "momentum"),
    ],
)
def test_unknown_argument_names_the_nearest(model, name, key, near):
    with pytest.raises(ValueError, match=f"Invalid argument for {name}: '{key}'.*did you mean {near}\\?"):
        build_optimizer(name, model, args={key: 1})


@pytest.mark.parametrize("args", [{"betas": 0.9}, {"eps": "tiny"}, {"betas": (0.9,)}], ids=str)
def test_values_of_the_wrong_kind_are_value_errors(model, args):
    for name in ("AdamW", "GaLoreAdamW"):
        with pytest.raises(ValueError, match=next(iter(args))):
            build_optimizer(name, model, args=args)


def test_an_argument_is_given_once(model):
    with pytest.raises(ValueError, match="'lr' is also given"):
        build_optimizer("AdamW", model, lr=0.1, args={"lr": 0.2})


def test_weight_decay_is_never_dropped(model):
    with pytest.raises(ValueError, match="Invalid argument for Rprop: 'weight_decay'"):
        build_optimizer("Rprop", model, weight_decay=0.1)


def test_missing_bitsandbytes_is_said(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match=r"needs bitsandbytes, .*\[train\]"):
        build_optimizer("AdamW8bit", model)
    assert "AdamW8bit" not in optimizer_names()
    assert type(build_optimizer("AdamW", model)) is torch.optim.AdamW


@pytest.mark.filterwarnings("ignore:.*compresses no parameter")
def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = Toy()
    for name in ("GaLoreAdamW", "AdamW", "SGD"):
        held = [p for group in build_optimizer(name, model).param_groups for p in group["params"]]
        assert all(p.is_meta for p in held)


def test_accepted_arguments():
    assert {"lr", "rank", "scale", "targets"} <= set(accepted_arguments("GaLoreAdamW"))
    assert "targets" not in accepted_arguments("AdamW")
    assert not {"self", "params"} & set(accepted_arguments("AdamW"))
