"""Link prediction on a generated tree: a layer on the hyperboloid against a Euclidean one of the same size.

Pairs (node, ancestor) of a random tree are the links. A tenth of those that are no edges is held out; the rest train
an embedding and one linear layer, in either geometry, with the same loss, optimizer, steps and numbers. The score of
a pair is its squared distance. Prints the area under the ROC curve of held-out links against pairs that are none, and
how often the right ancestor is the nearest of a hundred. A third model holds the hyperbolic layer's weight as SST.

    python examples/lorentz_tree.py [--nodes 1000] [--size 8] [--steps 300] [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from lowrank_optim import SSTAdamW, spectral_groups
from lowrank_optim.nn import SST
from lowrank_optim.nn.hyperbolic import LorentzLinear, on_hyperboloid, squared_lorentz_distance

NEGATIVES = 10
CANDIDATES = 100
Pairs = NDArray[np.int64]


class Links(NamedTuple):
    """Pairs (node, ancestor) to train on and held out, and which of all pairs are related."""

    train: Pairs
    held_out: Pairs
    related: NDArray[np.bool_]


class Scores(NamedTuple):
    """Of held-out links: area under the ROC curve, and share ranked first of CANDIDATES."""

    auc: float
    first: float


def make_links(nodes: int, rng: np.random.Generator) -> Links:
    """A tree whose inner nodes have about three children, closed transitively."""
    parent = [0] + [int(rng.integers((i - 1) // 4, (i - 1) // 2 + 1)) for i in range(1, nodes)]
    edges, far = [], []
    related = np.eye(nodes, dtype=bool)
    for node in range(1, nodes):
        edges.append((node, parent[node]))
        related[node] |= related[parent[node]]
        ancestors = np.flatnonzero(related[node])
        far += [(node, int(a)) for a in ancestors if a not in (node, parent[node])]
    far_pairs = rng.permutation(np.array(far))
    held = len(far) // 10
    return Links(np.concatenate([np.array(edges), far_pairs[held:]]), far_pairs[:held], related | related.T)


class Euclidean(nn.Module):
    def __init__(self, nodes: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(nodes, size)
        self.layer = nn.Linear(size, size)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self) -> Tensor:
        return self.layer(self.embed.weight)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum(dim=-1)


class Hyperbolic(nn.Module):
    """As :class:`Euclidean`, with one embedded coordinate less: time follows from space."""

    def __init__(self, nodes: int, size: int, weight: SST | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(nodes, size - 1)
        self.layer = LorentzLinear(size, size, weight=weight)
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self) -> Tensor:
        return self.layer(on_hyperboloid(self.embed.weight))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return squared_lorentz_distance(x, y)


def corrupt(pairs: Pairs, count: int, links: Links, rng: np.random.Generator) -> Pairs:
    """For each pair ``count`` random partners of its node, (pairs, count); related ones are drawn once more."""
    nodes = len(links.related)
    partners = rng.integers(nodes, size=(len(pairs), count))
    again = links.related[pairs[:, :1], partners]
    while again.any():
        partners[again] = rng.integers(nodes, size=int(again.sum()))
        again = links.related[pairs[:, :1], partners]
    return partners


def train(
    model: Euclidean | Hyperbolic, links: Links, optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int, seed: int,
) -> Scores:  # fmt: skip
    rng = np.random.default_rng(seed)
    # The Fermi-Dirac decoder: a radius, and a temperature.
    model.register_parameter("radius", nn.Parameter(torch.tensor(2.0)))
    model.register_parameter("log_temperature", nn.Parameter(torch.tensor(0.0)))
    method = optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(method, steps)
    nodes, ancestors = torch.from_numpy(links.train).T
    for _ in range(steps):
        partners = torch.from_numpy(corrupt(links.train, NEGATIVES, links, rng))
        points = model()
        near = model.distance(points[nodes], points[ancestors])
        far = model.distance(points[nodes][:, None], points[partners])
        heat = model.get_parameter("log_temperature").exp()
        radius = model.get_parameter("radius")
        loss = softplus((near - radius) / heat).mean() + softplus((radius - far) / heat).mean()
        method.zero_grad()
        loss.backward()
        method.step()
        schedule.step()
    return evaluate(model, links, np.random.default_rng(0))


@torch.no_grad()
def evaluate(model: Euclidean | Hyperbolic, links: Links, rng: np.random.Generator) -> Scores:
    points = model()
    nodes, ancestors = torch.from_numpy(links.held_out).T
    partners = torch.from_numpy(corrupt(links.held_out, CANDIDATES - 1, links, rng))
    near = model.distance(points[nodes], points[ancestors])
    far = model.distance(points[nodes][:, None], points[partners])
    ordered = far.flatten().sort().values
    # Pairs beyond each link, ties counted half: the Mann-Whitney statistic.
    below, not_above = (torch.searchsorted(ordered, near, right=right).double() for right in (False, True))
    auc = 1 - float((below + not_above).mean()) / (2 * len(ordered))
    return Scores(auc, float((near[:, None] < far).all(dim=1).double().mean()))


def run(nodes: int, size: int, steps: int, seed: int, lr: float) -> dict[str, Scores]:
    """Train the three models on one tree; the same arguments give the same scores."""
    links = make_links(nodes, np.random.default_rng(seed))
    sst = SST(rank=max(1, size // 4), std=size**-0.5)
    adam = lambda m: torch.optim.Adam(m.parameters(), lr=lr)  # noqa: E731
    sampled = lambda m: SSTAdamW(spectral_groups(m), lr=lr, update_proj_gap=10, seed=seed)  # noqa: E731
    scores = {}
    for name, build, optimizer in (
        ("Euclidean", lambda: Euclidean(nodes, size), adam),
        ("Lorentz", lambda: Hyperbolic(nodes, size), adam),
        ("Lorentz, SST", lambda: Hyperbolic(nodes, size, sst), sampled),
    ):
        torch.manual_seed(seed)
        scores[name] = train(build(), links, optimizer, steps, seed)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=8, help="coordinates of a point, and sides of the layer")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.03)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for name, (auc, first) in run(**vars(options)).items():
        print(f"{name:14} AUC {auc:.4f}   first of {CANDIDATES}: {first:.3f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
