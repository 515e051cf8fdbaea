"""A small language model for the tests of the parameterizations, and a training loop without surprises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB = 61


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width)
        self.self_attn = nn.Linear(width, width)
        self.mlp_up = nn.Linear(width, hidden, bias=False)
        self.mlp_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x).cumsum(1) / 8)
        return x + self.mlp_down(nn.functional.silu(self.mlp_up(x)))


class TinyLM(nn.Module):
    """Odd sizes: width 24, hidden 37, so that nothing may rely on alignment."""

    def __init__(self, width: int = 24, hidden: int = 37) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(x)
        return logits


def batch(step: int) -> Tensor:
    """Sequences that count upwards modulo the vocabulary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (8, 1), generator=generator)
    stride = torch.randint(1, 4, (8, 1), generator=generator)
    return (start + stride * torch.arange(12)) % VOCAB


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of the given steps."""
    losses = []
    for step in steps:
        ids = batch(step)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
