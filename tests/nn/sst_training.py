"""A small model with SST layers and its training, also as a process of its own that resumes files into others.

python -m tests.nn.sst_training LAST_STEP FILE ...    writes FILE.end
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, spectral_groups
from lowrank_optim.nn import SST, convert

RANK, GAP, ROUND = 3, 7, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(12, 17)
        self.mlp = nn.Linear(17, 12, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(self.attn(x).relu()))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Toy, SSTAdamW]:
    torch.manual_seed(seed)
    model = Toy().to(dtype)
    convert(model, SST(rank=RANK), seed=seed)
    settings = {"lr": 0.02, "update_proj_gap": GAP, "samples_per_round": ROUND, **options}
    return model, SSTAdamW(spectral_groups(model), **settings)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(step))
    # The next token is a function of this one, so there is something to learn.
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (7 * tokens + 3).flatten() % 30)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def save(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    last = int(sys.argv[1])
    for path in sys.argv[2:]:
        saved = torch.load(path, weights_only=True)
        # Another seed: whatever is not in the file would differ.
        model, optimizer = make(seed=5, dtype=saved["model"]["head.weight"].dtype)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, saved["step"], last)
        save(f"{path}.end", model, optimizer, last)
