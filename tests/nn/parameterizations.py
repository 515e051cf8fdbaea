"""The table that drives the suite of parameterizations: one row a set of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lowrank_optim import LOROAdamW, SSTAdamW
from lowrank_optim.nn import (
    LORO,
    LOST,
    SST,
    CoLA,
    LoRA,
    LowRank,
    Maestro,
    MergeAndRestart,
    MomentumReset,
    OrderedDropout,
    Parameterization,
    ReLoRA,
    SLTrain,
    TernaryLowRank,
    WeightRefactorization,
)
from lowrank_optim.nn.restarts import Restart


def adamw(model: nn.Module) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def refactorize(model: nn.Module, optimizer: Optimizer) -> list[Restart]:
    return [WeightRefactorization(model, every=12), MomentumReset(model, optimizer, every=12, ramp=4)]


class Variant(NamedTuple):
    """Options, whether the layer holds a dense m x n tensor by design, and what it trains with.

    straight_through: whether its gradient is none that finite differences know.
    keeps: the relative error with which it keeps a dense weight of rank 3; None for rounding alone.
    """

    options: Parameterization
    dense: bool = False
    straight_through: bool = False
    keeps: float | None = None
    optimizer: Callable[[nn.Module], Optimizer] = adamw
    restarts: Callable[[nn.Module, Optimizer], Sequence[Restart]] = lambda model, optimizer: ()


VARIANTS = {
    "LowRank": Variant(LowRank(rank=4)),
    "LowRank-spectral": Variant(LowRank(rank=4, alpha=8, init="spectral")),
    "LowRank-kaiming": Variant(LowRank(rank=4, alpha=8, init="kaiming"), restarts=refactorize),
    "LORO": Variant(
        LORO(rank=4), optimizer=lambda model: LOROAdamW(model.named_parameters(), lr=2e-2, update_proj_gap=12)
    ),
    "CoLA": Variant(CoLA(rank=4)),
    "CoLA-none": Variant(CoLA(rank=4, act="none")),
    "LoRA": Variant(LoRA(rank=4), dense=True),
    "ReLoRA": Variant(
        ReLoRA(rank=4),
        dense=True,
        restarts=lambda model, optimizer: [MergeAndRestart(model, optimizer, every=12, ramp=4, seed=3)],
    ),
    "SLTrain": Variant(SLTrain(rank=4, sparsity=0.05, alpha=8), restarts=refactorize),
    # Enough entries that a bitmap is the smallest index.
    "SLTrain-bitmap": Variant(SLTrain(rank=4, sparsity=0.3, alpha=8)),
    "LOST": Variant(LOST(rank=4, sparsity=0.2)),
    "LOST-none": Variant(LOST(rank=4, sparsity=0.2, act="none")),
    "Maestro": Variant(
        Maestro(rank=4),
        restarts=lambda model, optimizer: [OrderedDropout(model, optimizer, every=12, lasso=0.3, seed=3)],
    ),
    "TernaryLowRank": Variant(TernaryLowRank(rank=4), dense=True, straight_through=True, keeps=0.5),
    # The enhanced gradient is none that finite differences know; tests/nn/test_spectral.py has it.
    "SST": Variant(
        SST(rank=4, enhanced=False),
        optimizer=lambda model: SSTAdamW(model.named_parameters(), lr=1e-2, update_proj_gap=12, samples_per_round=3),
    ),
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


# Updates after 100 in the test of resumption: past the next restart, sample and step on the manifold, at 108.
MORE = 14
TARGETS = ["attn.q_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def block(**kwargs: Any) -> Block:
    torch.manual_seed(0)
    return Block(**kwargs)


def loss_of(model: nn.Module, batch: int) -> Tensor:
    """The loss of a batch by number; the task is to add 3 modulo the vocabulary."""
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(batch))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 3) % 11)


def train(
    model: nn.Module, optimizer: Optimizer, first: int, steps: int, restarts: Sequence[Restart] = ()
) -> list[float]:
    """Losses of ``steps`` updates from batch number ``first`` on."""
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for restart in restarts:
            restart.after_step(step + 1)
        losses.append(loss.item())
    return losses
