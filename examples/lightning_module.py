"""GaLore in a LightningModule: automatic optimization, and updates within the backward pass.

Automatic optimization needs nothing special: ``accumulate_grad_batches``, ``gradient_clip_val`` and ``precision`` do
what they say. Updates within the backward pass are manual optimization. Random tokens and a tiny LLaMA.

    python examples/lightning_module.py      # pip install "lowrank-optim[train,integrations]"
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_optim import GaLoreAdamW, low_rank_groups, step_in_backward

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Automatic(LightningModule):
    """A causal language model that Lightning updates."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))

    def configure_optimizers(self) -> Any:
        self.method = GaLoreAdamW(low_rank_groups(self.model, rank=8, update_proj_gap=3), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.method, lambda update: min(1.0, (update + 1) / 4))
        return [self.method], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.log("loss", loss := self.model(input_ids=batch, labels=batch).loss, prog_bar=True)
        return loss


class PerLayer(Automatic):
    """The same, but every parameter is updated within the backward pass and its gradient freed."""

    automatic_optimization, accumulate = False, 2

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        self.handle = step_in_backward(self.method, accumulate=self.accumulate, max_norm=1.0)
        return made

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        with self.handle.micro_batch():
            self.manual_backward(super().training_step(batch, index) / self.accumulate)
        if (index + 1) % self.accumulate == 0:
            self.optimizers().step()  # Finds nothing to do, but Lightning counts the updates by it.
            self.lr_schedulers().step()
            self.log("grad_norm", self.handle.grad_norm, prog_bar=True)


if __name__ == "__main__":
    Trainer(max_epochs=1).fit(PerLayer(), DataLoader(torch.randint(128, (64, 16)), batch_size=4))
