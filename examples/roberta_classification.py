"""Fine-tune a RoBERTa with GaLore or Fira at rank 4, as both papers do on GLUE, on a small local task.

Words or code? Lines of the Python standard library, as bytes. The model is tiny and random, so that nothing is
downloaded; ``RobertaForSequenceClassification.from_pretrained("roberta-base")`` and its tokenizer take its place.

    python examples/roberta_classification.py [FiraAdamW]
"""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

import lowrank_optim

PAD, LENGTH = 1, 48
STDLIB = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def examples(count: int) -> tuple[Tensor, Tensor]:
    """``count`` lines as bytes (count, LENGTH), comments and statements in turn, and which of them are comments."""
    lines = [line.strip() for path in STDLIB for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if 16 <= len(line) <= LENGTH and line.isascii()]
    comments = [line.lstrip("# ") for line in lines if line.startswith("# ")]
    code = [line for line in lines if line.startswith(("self.", "return ", "raise ", "def ", "if ", "for "))]
    pairs = zip(random.Random(0).sample(comments, count // 2), random.Random(0).sample(code, count // 2))
    rows = [list(line.encode().ljust(LENGTH, bytes([PAD]))) for pair in pairs for line in pair]
    return torch.tensor(rows), 1 - torch.arange(count) % 2


def accuracy(name: str, steps: int, batch: int = 16, lr: float = 3e-3) -> float:
    """The share of 400 held-out lines that a model trained with the optimizer ``name`` tells right."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH + 2, pad_token_id=PAD,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    # The layers' matrices at rank 4; embeddings, norms, biases and the new classifier with full Adam.
    optimizer = getattr(lowrank_optim, name)(lowrank_optim.low_rank_groups(model, rank=4, update_proj_gap=50), lr=lr)
    rows, labels = examples(2000)
    for _ in range(steps):
        some = torch.randint(1600, (batch,))
        model(rows[some], (rows[some] != PAD).long(), labels=labels[some]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(rows[1600:], (rows[1600:] != PAD).long()).logits
    return float((logits.argmax(dim=-1) == labels[1600:]).double().mean())


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["GaLoreAdamW", "FiraAdamW"]:
        print(f"{chosen}: {accuracy(chosen, steps=150):.1%} of the held-out lines")
