"""The examples run, do what they say, and stay short."""

from __future__ import annotations

import importlib.util
import math
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, LDAdamW, Muon, SSTAdamW, low_rank_groups, spectral_groups
from lowrank_optim.integrations.transformers import PerLayer, trainer_optimizer
from lowrank_optim.nn import SST, convert

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same_tensors(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same(one: nn.Module, other: nn.Module) -> bool:
    return same_tensors(weights(one), weights(other))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_examples_are_short_and_in_the_docs() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        # A study with three models and an evaluation of its own.
        assert path.stem == "lorentz_tree" or path.read_text(encoding="utf-8").count("\n") <= 60, path.name
        assert f"examples/{path.name}" in page


def test_node_classification() -> None:
    module = example("node_classification")
    # Chance is a quarter; neighbours alone, without training, say nothing of the label.
    assert module.accuracy(module.make_graph(), spectral=True, steps=30) > 0.5


ARGUMENTS: dict[str, Any] = {
    "learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (GaLoreAdamW, {"rank": 4}, {"rank": 4, "lr": 3e-3, "eps": 1e-7, "betas": (0.8, 0.95), "weight_decay": 0.1}),
        (GaLoreAdamW, {"rank": 4, "lr": 0.5, "eps": 1e-6}, {"lr": 0.5, "eps": 1e-6, "betas": (0.8, 0.95)}),
        (GaLoreAdafactor, {"rank": 4}, {"lr": 3e-3, "eps": (1e-30, 1e-3), "weight_decay": 0.1}),
        (LDAdamW, {"rank": 4, "groups": partial(low_rank_groups, targets="mlp")}, {"betas": (0.8, 0.95)}),
        (Muon, {}, {"lr": 3e-3, "weight_decay": 0.1}),
        (SSTAdamW, {"groups": spectral_groups}, {"lr": 3e-3, "eps": 1e-7, "weight_decay": 0.0}),
    ],
)
def test_arguments_of_the_trainer_arrive(cls: type, options: dict[str, Any], expected: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(9, 12), nn.ModuleDict({"mlp": nn.Linear(12, 16)}), nn.LayerNorm(16))
    if cls is SSTAdamW:
        convert(model, SST(rank=4))
    factory, kwargs = trainer_optimizer(cls, SimpleNamespace(**ARGUMENTS), **options)
    # As the Trainer does it.
    optimizer = factory()(model, **kwargs)
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
    # Of the embedding, and of the norm with the bias.
    assert [group["weight_decay"] for group in optimizer.param_groups[-2:]] == [0.1, 0.0]
    assert [group["param_names"] for group in optimizer.param_groups[-2:]] == [
        ["0.weight"],
        ["1.mlp.bias", "2.weight", "2.bias"],
    ]


class FakeTrainer:
    """The methods of a Trainer that PerLayer goes through."""

    optimizer: Any = None
    model: Any

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        self.model, self.logged = model, []
        self.args = SimpleNamespace(fp16=False, gradient_accumulation_steps=2, max_grad_norm=0.0, **arguments)

    def create_optimizer(self) -> Any:
        if self.optimizer is None:
            self.optimizer = GaLoreAdamW(low_rank_groups(self.model, targets="0", rank=2), lr=0.1)
        return self.optimizer

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.model(batch).square().sum()
        loss.backward()
        return loss.detach()

    def log(self, logs: dict[str, float]) -> None:
        self.logged.append(logs)


def test_per_layer_updates_and_logs() -> None:
    class Both(PerLayer, FakeTrainer):
        pass

    trainer = Both(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    trainer.create_optimizer()
    # A second call to train() finds the optimizer and makes no second handle.
    trainer.create_optimizer()
    before = weights(trainer.model)
    for count in (2, 1):
        trainer.current_gradient_accumulation_steps = count
        for number in range(count):
            assert number == 0 or same_tensors(before, weights(trainer.model))
            trainer.training_step(torch.randn(3, 4))
        before, earlier = weights(trainer.model), before
        assert not same_tensors(before, earlier)
        assert all(param.grad is None for param in trainer.model.parameters())
        trainer.log({"loss": 1.0, "grad_norm": 0.0})
    trainer.log({"eval_loss": 1.0})
    assert all(row["grad_norm"] > 0 for row in trainer.logged[:2]) and trainer.logged[2] == {"eval_loss": 1.0}


def test_per_layer_refuses_loss_scaling() -> None:
    class Both(PerLayer, FakeTrainer):
        pass

    trainer = Both(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="Invalid fp16: True"):
        trainer.create_optimizer()


@pytest.mark.slow
def test_groups_decay_what_the_trainer_decays(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the bridge needs lowrank-optim[train]")
    models = [
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
        transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TINY)),
    ]
    for model in models:
        args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **ARGUMENTS)
        made = trainer_optimizer(GaLoreAdamW, args, rank=4)
        trainer = transformers.Trainer(model, args, optimizer_cls_and_kwargs=made, train_dataset=[])
        optimizer = trainer.create_optimizer()
        decayed = [name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]]
        assert sorted(decayed) == sorted(trainer.get_decay_parameter_names(model))
        assert any(row.method != "full-rank" for row in optimizer.explain())


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_trainer_resumes_to_the_last_bit(tmp_path: Path, per_layer: bool) -> None:
    module = example("transformers_trainer")
    through = module.train(str(tmp_path / "one"), per_layer=per_layer)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    resumed = module.train(str(tmp_path / "two"), per_layer=per_layer, resume=True)
    assert through.state.global_step == resumed.state.global_step == 8
    # The second epoch has begun: the last update of the first had one micro-batch.
    assert through.state.epoch > 1
    assert same(through.model, resumed.model)
    norms = [[row["grad_norm"] for row in run.state.log_history if "grad_norm" in row] for run in (through, resumed)]
    assert norms[0] == norms[1] and min(norms[0]) > 0


@pytest.mark.slow
def test_updates_in_the_backward_pass_of_trainer_are_those_of_the_plain_one(tmp_path: Path) -> None:
    module = example("transformers_trainer")
    more = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    plain, inside = (
        module.train(str(tmp_path / str(per_layer)), per_layer=per_layer, **more) for per_layer in (False, True)
    )
    assert same(plain.model, inside.model)
    norms = [[row["grad_norm"] for row in run.state.log_history if "grad_norm" in row] for run in (plain, inside)]
    torch.testing.assert_close(norms[0], norms[1])
    assert all(param.grad is None for param in inside.model.parameters())


@pytest.mark.slow
def test_accelerate_resumes_to_the_last_bit(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the example needs lowrank-optim[train]")
    module = example("accelerate_loop")
    module.train(3, save=tmp_path / "state")
    assert same(module.train(6), module.train(6, first=3, load=tmp_path / "state"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Automatic", "PerLayer"])
def test_lightning_resumes_to_the_last_bit(tmp_path: Path, name: str) -> None:
    lightning = pytest.importorskip("lightning", reason="the example needs lowrank-optim[integrations]")
    module = example("lightning_module")
    tokens = torch.randint(128, (16, 16))

    def fit(epochs: int, path: Path | None = None) -> Any:
        torch.manual_seed(1)
        model = getattr(module, name)()
        made = lightning.pytorch.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            accumulate_grad_batches=2 if name == "Automatic" else 1,
        )  # fmt: skip
        made.fit(model, torch.utils.data.DataLoader(tokens, batch_size=4), ckpt_path=path)
        return made

    made = fit(1)
    assert made.global_step == 2
    made.save_checkpoint(tmp_path / "one.ckpt")
    through, resumed = fit(2), fit(2, tmp_path / "one.ckpt")
    assert through.global_step == resumed.global_step == 4
    assert same(through.model, resumed.model)


@pytest.mark.slow
@pytest.mark.parametrize("base", [False, True])
def test_peft(tmp_path: Path, base: bool) -> None:
    peft = pytest.importorskip("peft", reason="the example needs lowrank-optim[integrations]")
    module = example("peft_lora")
    model = module.build()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = module.train(model, base=base)
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    factors = {name for name in before if "lora_" in name}
    below = {name for name in before if name.endswith("base_layer.weight")}
    assert changed == (factors | below if base else factors)
    compressed = {row.name for row in optimizer.explain() if row.method != "full-rank"}
    assert compressed == (below if base else set())
    model.save_pretrained(tmp_path)
    if not base:
        again = peft.PeftModel.from_pretrained(module.build().unload(), tmp_path)
        tokens = torch.arange(16)[None]
        torch.testing.assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW"])
def test_roberta_learns(name: str) -> None:
    pytest.importorskip("transformers", reason="the example needs lowrank-optim[train]")
    assert name in lowrank_optim.__all__
    assert example("roberta_classification").accuracy(name, steps=60) > 0.75


@pytest.mark.slow
def test_continued_pretraining(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the example needs lowrank-optim[train]")
    from lowrank_optim.pretrain.metrics import read_metrics

    assert example("continued_pretraining").continued(tmp_path, steps=30) == 0
    assert (tmp_path / "continued" / "report.html").exists()
    losses = [
        [row["eval_loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "eval_loss" in row]
        for run in ("pretrained", "continued")
    ]
    # It begins with what was learned, and learns from the other half.
    assert losses[0][0] > math.log(400) and losses[1][0] < losses[0][0] - 0.5
    assert losses[1][-1] < losses[1][0]
