"""What gradients of a small LLaMA hold: ``python -m benchmarks.converge --suite cpu --diagnose``.

After some updates with AdamW, a batch is split in two. For every hidden matrix ``results/diagnose.json`` has:

- reproducible: how many of the r leading directions the halves have in common, as the number of singular values of
  P_a^T P_b above what random subspaces reach, 2 sqrt(q (1 - q)) with q = r / d, and above 1/2;
- overlap: the sum of their squares, of which r^2 / d is chance;
- scaling_correlation: between the factors by which Adam scales the columns of the gradient at full rank and in the
  subspace of GaLore, which Fira assumes to be alike.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.converge import HIDDEN, build, load_tokens
from benchmarks.converge_runs import CPU, Run, Suite
from benchmarks.methods import METHODS
from lowrank_optim.pretrain.batches import shuffled_windows
from lowrank_optim.pretrain.steps import loss_sum
from lowrank_optim.pretrain.update import Updater

WIDE = CPU._replace(
    shape={**CPU.shape, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}, updates=60
)
# Published: 128 of 2048, a sixteenth; GaLore's usual quarter.
RANKS = (16, 64)
# Micro-batches a half.
HALVES = (1, 8)


def reproducible(one: Tensor, other: Tensor, rank: int) -> tuple[int, float]:
    """Directions that the leading subspaces of two gradients (d, n) with d <= n share, and their overlap."""
    bases = [torch.linalg.svd(grad, full_matrices=False).U[:, :rank] for grad in (one, other)]
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
    share = rank / one.shape[0]
    chance = 2 * math.sqrt(share * (1 - share)) if share < 0.5 else 1.0
    return int((cosines > max(0.5, chance)).sum()), float(cosines.square().sum())


def scaling_correlation(grads: list[Tensor], rank: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """The correlation over columns of ||Adam(G)|| / ||G|| and ||Adam(P^T G)|| / ||P^T G||, after some gradients."""
    basis = torch.linalg.svd(grads[0], full_matrices=False).U[:, :rank]
    factors = []
    for rows in (grads, [basis.T @ grad for grad in grads]):
        first, second = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for grad in rows:
            first.lerp_(grad, 1 - betas[0])
            second.lerp_(grad.square(), 1 - betas[1])
        steps = len(rows)
        root = (second / (1 - betas[1] ** steps)).sqrt() + 1e-8
        factors.append((first / (1 - betas[0] ** steps) / root).norm(dim=0) / rows[-1].norm(dim=0))
    return float(torch.corrcoef(torch.stack(factors).log())[0, 1])


def gradients(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """The summed gradients of the hidden matrices, the shorter side first."""
    model.zero_grad()
    for batch in batches:
        loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]
    named = {name: p.grad for name, p in model.named_parameters() if HIDDEN in name and p.grad is not None}
    return {name: (g if g.shape[0] <= g.shape[1] else g.T).clone() for name, g in named.items()}


def diagnose(data: Path, suite: Suite = WIDE) -> Path:
    """Train, take gradients, write ``results/diagnose.json``."""
    tokens = load_tokens(CPU, data)
    settled, model, optimizer = build(suite, Run(METHODS["AdamW"], 1e-3, 0, 1e-3))
    update = Updater(settled, model, optimizer)
    stream = (b for b, _ in shuffled_windows(tokens.train, suite.seq_len, suite.batch_size, 0, 1, 0, None))
    for batch in islice(stream, suite.updates):
        made = update([batch], batch.targets)
    batches = []
    for count in HALVES:
        halves = [gradients(model, list(islice(stream, count))) for _ in range(2)]
        layers = []
        for name, grad in halves[0].items():
            for rank in RANKS:
                found, overlap = reproducible(grad, halves[1][name], rank)
                chance = rank**2 / grad.shape[0]
                row = {"name": name, "rank": rank, "reproducible": found, "overlap": overlap, "chance": chance}
                layers.append(row)
        batches.append({"tokens": count * suite.batch_size * suite.seq_len, "layers": layers})
    series = [gradients(model, [batch]) for batch in islice(stream, 8)]
    scaling = [
        {"name": name, "scaling_correlation": scaling_correlation([grads[name] for grads in series], RANKS[-1])}
        for name in series[0]
    ]
    figures = {
        "width": suite.shape["hidden_size"], "updates": suite.updates, "loss": made.loss, "ranks": RANKS,
        "batches": batches, "scaling": scaling,
    }  # fmt: skip
    return common.write_result("diagnose", torch.device("cpu"), figures)
