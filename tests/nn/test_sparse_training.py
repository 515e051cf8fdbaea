"""SLTrain and LOST in a model: trained, saved, resumed in another process, merged."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_optim import GaLoreAdamW
from lowrank_optim.nn import LOST, Parameterization, SLTrain, convert, merge
from tests.nn.models import TinyLM, batch, train

ROOT = Path(__file__).parents[2]
CASES: dict[str, Parameterization] = {
    "SLTrain": SLTrain(rank=4, sparsity=0.05, alpha=8),
    # Enough entries that a bitmap is the smallest index.
    "SLTrain-bitmap": SLTrain(rank=4, sparsity=0.2, alpha=8),
    "LOST": LOST(rank=4, sparsity=0.1, std=0.2),
    "LOST-linear": LOST(rank=4, sparsity=0.1, act="none", std=0.2),
}
LINEAR = [name for name in CASES if name != "LOST"]

RESUME = """
import sys, torch
from lowrank_optim.nn import convert
from tests.nn.models import TinyLM, train
from tests.nn.test_sparse_training import CASES
torch.set_num_threads(1)
torch.manual_seed(99)
resumed = {}
for name, saved in torch.load(sys.argv[1], weights_only=True).items():
    model = TinyLM()
    convert(model, CASES[name], seed=99)
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(100, 110))
    resumed[name] = model.state_dict()
torch.save(resumed, sys.argv[2])
"""


def test_resume_bit_identically_in_a_new_process(tmp_path: Path) -> None:
    models, saved = {}, {}
    for name, options in CASES.items():
        model = models[name] = TinyLM()
        convert(model, options, seed=7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = train(model, optimizer, range(100))
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), name
        saved[name] = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, range(100, 110))
    torch.save(saved, tmp_path / "saved.pt")
    subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path / "saved.pt"), str(tmp_path / "resumed.pt")],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    for name, model in models.items():
        expected = model.state_dict()
        assert resumed[name].keys() == expected.keys()
        for key, value in expected.items():
            assert resumed[name][key].dtype == value.dtype
            assert torch.equal(resumed[name][key], value), (name, key)


@pytest.mark.parametrize("name", LINEAR)
def test_merged_model_gives_the_same_logits(name: str) -> None:
    model = TinyLM()
    names = convert(model, CASES[name])
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), range(60))
    expected = model(batch(1000)).detach()
    merge(model)
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name in names)
    assert float((model(batch(1000)) - expected).abs().max()) < 1e-4
    assert model.state_dict().keys() == TinyLM().state_dict().keys()


def test_a_nonlinear_model_refuses_to_merge() -> None:
    model = TinyLM()
    convert(model, CASES["LOST"])
    with pytest.raises(RuntimeError, match="LOSTLinear has an activation"):
        merge(model)


@pytest.mark.parametrize("name", CASES)
def test_trains_with_galore_and_in_bf16(name: str) -> None:
    model = TinyLM()
    convert(model, CASES[name])
    optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=2, update_proj_gap=10, scale=1.0)
    # The factors' smaller side is their rank 4.
    compressed = [row.name for row in optimizer.explain() if row.method == "rank 2"]
    assert "layers.0.self_attn.A" in compressed
    assert "layers.0.self_attn.values" not in compressed
    losses = train(model, optimizer, range(60))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    halved = model.to(torch.bfloat16)
    kept = {key: value.dtype for key, value in halved.state_dict().items() if not value.is_floating_point()}
    assert set(kept.values()) <= {torch.uint8, torch.int32}
    assert train(halved, torch.optim.AdamW(halved.parameters(), lr=1e-3), range(60, 62))[0] < losses[0]


@pytest.mark.parametrize("name", CASES)
def test_accumulated_micro_batches_equal_one_batch(name: str) -> None:
    model = TinyLM().double()
    convert(model, CASES[name])
    ids = batch(0)
    parts = [ids, ids[:4], ids[4:]]
    grads = []
    for chosen in ([parts[0]], parts[1:]):
        model.zero_grad()
        for part in chosen:
            logits = model(part[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum")
            loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = CASES[name].build(24, 37, bias=True)
    x = torch.randn(5, 24, requires_grad=True)
    direct = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
