"""A small model with every kind of shard, and what one process makes of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.optim import sharding

# Examples of a batch: more than any side, so that no gradient has a null space for rounding errors to fill.
EXAMPLES = 64


class Model(nn.Module):
    """Matrices, a convolution and stacked experts, with sides that no number of processes divides, and empty shards."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(20, 53)
        self.down = nn.Linear(53, 20, bias=False)
        self.wide = nn.Linear(48, 20, bias=False)
        self.square = nn.Linear(20, 20, bias=False)
        # Six rows: over four processes one gets none.
        self.probe = nn.Linear(20, 6)
        self.convolution = nn.Conv1d(8, 20, 3)
        self.experts = nn.Parameter(0.1 * torch.randn(3, 20, 10))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.convolution(x.view(-1, 8, 6)).mean(-1) + (x[:, None, None, :10] @ self.experts.mT).mean((1, 2))
        hidden = self.square(self.wide(x) + self.down(torch.tanh(self.up(x[:, :20]))) + mixed)
        loss: Tensor = (self.probe(hidden) * self.gain).square().mean() + hidden.pow(2).mean()
        return loss


def model(dtype: torch.dtype) -> Model:
    """The same one on every process."""
    torch.manual_seed(0)
    return Model().to(dtype)


def batch(update: int, dtype: torch.dtype) -> Tensor:
    """The same examples for everybody."""
    generator = torch.Generator().manual_seed(update)
    return torch.randn(EXAMPLES, 48, generator=generator, dtype=torch.float64).to(dtype)


def train(trained: nn.Module, optimizer: Optimizer, updates: range, dtype: torch.dtype) -> None:
    """Make some updates."""
    for update in updates:
        optimizer.zero_grad()
        trained(batch(update, dtype)).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor with all values."""
    return sharding.whole(tensor).detach()


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest of any parameter, as a share of its largest value."""
    return distance(one.parameters(), other.parameters())


def distance(ones: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """:func:`difference` of lists of parameters."""
    pairs = [(whole(a).double(), whole(b).double()) for a, b in zip(ones, others, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
