"""GaLore under the Trainer of transformers: what TrainingArguments say arrives, whole or layer by layer.

With ``--per-layer`` every parameter is updated within the backward pass and its gradient freed. Random tokens and a
tiny LLaMA; put your model, data and arguments in their place.

    python examples/transformers_trainer.py [--per-layer] [--steps 8] [--output-dir DIR] [--resume]
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_optim import GaLoreAdamW
from lowrank_optim.integrations.transformers import PerLayer, trainer_optimizer


class PerLayerTrainer(PerLayer, Trainer):
    """A Trainer whose backward pass updates."""


def train(folder: str, *, per_layer: bool = False, steps: int = 8, resume: bool = False, **changes: Any) -> Trainer:
    """Train on random tokens, with ``changes`` of the arguments, and return the Trainer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    rows = torch.randint(128, (42, 16), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
        "learning_rate": 1e-2, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "weight_decay": 0.1, "warmup_steps": 2,
        "logging_steps": 1, "save_steps": 4, "report_to": [], "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    args = TrainingArguments(folder, **{**settings, **changes})
    trainer = (PerLayerTrainer if per_layer else Trainer)(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=trainer_optimizer(GaLoreAdamW, args, rank=8, update_proj_gap=3),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-layer", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output-dir", default=tempfile.mkdtemp())
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint there")
    options = parser.parse_args()
    train(options.output_dir, per_layer=options.per_layer, steps=options.steps, resume=options.resume)
