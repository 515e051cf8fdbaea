"""The table that drives the suite of parameterizations: one row a set of options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_optim.nn import LORO, LOST, SST, CoLA, LoRA, LowRank, Parameterization, ReLoRA, SLTrain


class Variant(NamedTuple):
    """Options, and whether the layer holds a dense m x n tensor by design."""

    options: Parameterization
    dense: bool = False


VARIANTS = {
    "LowRank": Variant(LowRank(rank=4)),
    "LowRank-spectral": Variant(LowRank(rank=4, alpha=8, init="spectral")),
    "LowRank-kaiming": Variant(LowRank(rank=4, alpha=8, init="kaiming")),
    "LORO": Variant(LORO(rank=4)),
    "CoLA": Variant(CoLA(rank=4)),
    "CoLA-none": Variant(CoLA(rank=4, act="none")),
    "LoRA": Variant(LoRA(rank=4), dense=True),
    "ReLoRA": Variant(ReLoRA(rank=4), dense=True),
    "SLTrain": Variant(SLTrain(rank=4, sparsity=0.05, alpha=8)),
    # Enough entries that a bitmap is the smallest index.
    "SLTrain-bitmap": Variant(SLTrain(rank=4, sparsity=0.3, alpha=8)),
    "LOST": Variant(LOST(rank=4, sparsity=0.2)),
    "LOST-none": Variant(LOST(rank=4, sparsity=0.2, act="none")),
    # The enhanced gradient is none that finite differences know; tests/nn/test_spectral.py has it.
    "SST": Variant(SST(rank=4, enhanced=False)),
}


class Block(nn.Module):
    """Names as in a transformer: attention and MLP matrices of which one has a bias, a norm, a head."""

    def __init__(self, width: int = 12, hidden: int = 17, tokens: int = 11) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(width, width), "o_proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, hidden), "down_proj": nn.Linear(hidden, width)})
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        x = x + self.attn["o_proj"](torch.tanh(self.attn["q_proj"](x)))
        x = x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


TARGETS = ["attn.q_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def block(**kwargs: Any) -> Block:
    torch.manual_seed(0)
    return Block(**kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> list[float]:
    """Losses of ``steps`` updates from batch number ``first`` on; the task is to add 3 modulo the vocabulary."""
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 3) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
