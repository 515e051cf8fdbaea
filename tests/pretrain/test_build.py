"""What lowrank-memory simulates and measures is what train_llama.py trains: the same model, the same update."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import train_llama
from lowrank_optim.memory import measure
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.config import Options
from lowrank_optim.pretrain.llama import PRESETS, build_config
from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS, published
from lowrank_optim.pretrain.update import Updater
from tests.conformance import nightly

ROOT = Path(__file__).parents[2]
LINES = {
    "clipped": "--grad-clip 0.5",
    "as published": "",
    "its own activation": "--parameterization cola --parameterization-args rank=4 hidden_act=linear",
    "sparse layers": "--parameterization sltrain --parameterization-args rank=4",
    "all logits": "--checkpointing --no-chunked-loss --accumulate 2",
    "per layer": "--optimizer GaLoreAdamW8bit --optimizer-args rank=4 update_proj_gap=2 --weights int8 --per-layer"
    " --accumulate 2 --accumulate-dtype bf16 --grad-clip 0.25",
}


def layers(model: nn.Module) -> dict[str, Any]:
    """Every module's class, and shape, dtype and role of every tensor."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {"classes": classes, "trained": trained, "tensors": {n: (tuple(t.shape), t.dtype) for n, t in tensors}}


def facts(update: Updater) -> dict[str, Any]:
    """Everything of an update that its memory depends on."""
    handle = update.in_backward
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "clip_norm")}
        for group in update.optimizer.param_groups
    ]
    return {
        **layers(update.model),
        "activation": type(update.model.model.layers[0].mlp.act_fn),
        "checkpointing": update.model.is_gradient_checkpointing,
        "chunked": update.network.chunked,
        "optimizer": type(update.optimizer),
        "groups": groups,
        "grad_clip": update.run.grad_clip,
        "in_backward": handle and (handle.accumulate, handle.max_norm, handle.clip_by, handle.sum_dtype),
        "schedule": [update.schedule.lr_lambdas[0](step) for step in range(4)],  # type: ignore[attr-defined]
    }


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The facts of each updater, as it stands before its first update."""
    seen: list[dict[str, Any]] = []
    known: set[int] = set()
    call = Updater.__call__

    def record(self: Updater, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in known:
            known.add(id(self))
            seen.append(facts(self))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Updater, "__call__", record)
    # One update of another model, which is for the figures of the memory.
    monkeypatch.setattr(measure, "_warm_up", lambda job: None)
    return seen


FAST = "clipped"
EACH = [pytest.param(line, id=name, marks=() if name == FAST else pytest.mark.slow) for name, line in LINES.items()]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("line", EACH)
def test_simulated_measured_and_trained_updates_are_alike(
    line: str, updates: list[dict[str, Any]], tiny_model: Path, shards: Path, tmp_path: Path
) -> None:
    common = ["--model", str(tiny_model), "--dtype", "bf16", "--seq-len", "24", "--batch-size", "2"]
    # The gap is what a simulation shortens to.
    common += ["--max-steps", "4", *line.split()]
    if "--optimizer" not in common and "--parameterization" not in common:
        common += ["--optimizer-args", "rank=4", "update_proj_gap=2"]
    run = ["--dataset", str(shards), "--sample-tokens", "0", "--output-dir", str(tmp_path)]
    assert train_llama.main([*common, *run]) == 0
    job = Job(**vars(parse_options(common)))
    simulate(job)
    measure.run(job, updates=1, device="cpu")
    trained, simulated, measured = updates
    assert simulated == trained
    assert measured == trained


# Every size as it is and with an activation of its own, every parameterization in one size.
PAIRS = [(size, name) for size in PRESETS for name in (None, *PARAMETERIZATIONS)]
PAIRS_BY_DEFAULT = [(size, name) for size, name in PAIRS if size == "llama_60m" or name in (None, "cola")]


@pytest.mark.parametrize(
    ("size", "name"), [*PAIRS_BY_DEFAULT, *nightly(*(pair for pair in PAIRS if pair not in PAIRS_BY_DEFAULT))]
)
def test_a_job_has_the_model_of_the_run(size: str, name: str | None) -> None:
    from transformers.activations import ACT2FN

    def shallow(options: Options) -> Any:
        config = build_config(size)
        config.num_hidden_layers = 1
        return build(options, "meta", config=config)[2]

    job = shallow(Job(model=size, parameterization=name))
    run = shallow(Options(model=size, parameterization=name, dtype="bf16"))
    assert layers(job) == layers(run)
    args = published(name, size, PRESETS[size].hidden).args if name else {}
    assert job.config.hidden_act == run.config.hidden_act == args.get("hidden_act", "silu")
    assert type(job.model.layers[0].mlp.act_fn) is type(ACT2FN[args.get("hidden_act", "silu")])


def test_a_job_survives_json() -> None:
    job = Job(optimizer="AdamW", optimizer_args={"betas": (0.9, 0.95)}, parameterization="cola", grad_clip=0.5)
    again = Job(**job.as_dict())
    assert {name: getattr(job, name) for name in MEMORY_OPTIONS} == {n: getattr(again, n) for n in MEMORY_OPTIONS}


def test_imports_point_downwards() -> None:
    for path in (ROOT / "lowrank_optim" / "pretrain").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lowrank_optim.memory"), path
