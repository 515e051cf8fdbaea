"""Small training runs of a LLaMA with one of our optimizers, for benchmarks that need real gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.config import Options, Resolved
from lowrank_optim.pretrain.data import Data, load_data
from lowrank_optim.pretrain.llama import build_config
from lowrank_optim.pretrain.schedule import build_schedule
from lowrank_optim.pretrain.steps import clip_gradients_, loss_sum
from lowrank_optim.pretrain.tokenization import BPE_VOCAB

C4_SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "c4_sample" / "en"


def default_dataset() -> str:
    """The sample of C4 beside the checkout where there is one, else the standard library's own text."""
    return str(C4_SAMPLE) if C4_SAMPLE.is_dir() else "stdlib"


class Training(NamedTuple):
    """A model at its start, with everything that trains it."""

    run: Resolved
    data: Data
    model: nn.Module
    optimizer: Optimizer

    def updates(self) -> Iterator[tuple[int, float]]:
        """Train; yields the number of the update, from 1, and its loss, when gradients are there and not yet used."""
        schedule = build_schedule(self.optimizer, warmup=self.run.warmup_steps, total=self.run.max_steps)
        stream = self.data.train(None)
        for step in range(1, self.run.max_steps + 1):
            batch, _ = next(stream)
            loss = loss_sum(self.model, batch) / batch.targets
            loss.backward()  # type: ignore[no-untyped-call]
            yield step, float(loss.detach())
            clip_gradients_(self.model.parameters(), self.run.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            schedule.step()


def prepare(options: Options) -> Training:
    """Build what ``options`` describe; without a tokenizer, the vocabulary is that of the one trained on the data.

    Raises:
        UserError, RuntimeError, ValueError: as the trainer raises them.
    """
    config = build_config(options.model)
    if not options.tokenizer:
        config.vocab_size = BPE_VOCAB
    run, _, model, optimizer = build(options, "cpu", config=config)
    return Training(run, load_data(run, vocab_size=config.vocab_size), model, optimizer)


def about(training: Training) -> dict[str, Any]:
    """What was run, for the JSON file."""
    run = training.run
    group = next(group for group in training.optimizer.param_groups if group["rank"] is not None)
    return {
        "model": Path(run.model).stem,
        "dataset": "c4_sample" if run.dataset == str(C4_SAMPLE) else Path(run.dataset).name,
        "steps": run.max_steps,
        "update_proj_gap": group["update_proj_gap"],
        "rank": group["rank"],
        "lr": run.lr,
        "tokens_an_update": run.batch_size * run.seq_len,
    }
