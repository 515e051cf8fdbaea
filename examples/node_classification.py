"""Classify the nodes of a random graph: a graph convolutional network with dense weights, and with SST's.

Four communities, a noisy feature vector a node, labels of a tenth of the nodes. SST holds the singular triplets of a
weight, trains eight of them at a time and draws others every fifty steps.

    python examples/node_classification.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, spectral_groups
from lowrank_optim.nn import SST, convert

NODES, KNOWN, COMMUNITIES, SIZE = 400, 40, 4, 32


class Graph(NamedTuple):
    """Features (NODES, SIZE), the normalized adjacency (NODES, NODES), the community of every node."""

    features: Tensor
    adjacency: Tensor
    labels: Tensor


def make_graph() -> Graph:
    """A stochastic block model: nodes of one community are linked eight times as often as others."""
    labels = torch.arange(NODES) % COMMUNITIES
    links = torch.bernoulli(torch.where(labels[:, None] == labels, 16 / NODES, 2 / NODES)).triu(diagonal=1)
    links = links + links.T + torch.eye(NODES)
    scale = links.sum(dim=1).rsqrt()
    features = torch.randn(COMMUNITIES, SIZE)[labels] + 4 * torch.randn(NODES, SIZE)
    return Graph(features, scale[:, None] * links * scale, labels)


def accuracy(graph: Graph, *, spectral: bool, steps: int = 100) -> float:
    """The share of nodes without a label that a network of two hidden layers tells right after training."""
    model = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, COMMUNITIES)])
    if spectral:
        convert(model, SST(rank=8), targets=("0", "1"), from_weight=True)
    groups = spectral_groups(model) if spectral else model.parameters()
    optimizer = SSTAdamW(groups, lr=3e-3, update_proj_gap=50) if spectral else torch.optim.AdamW(groups, lr=3e-3)
    for _ in range(steps + 1):
        x = graph.features
        for layer in model:
            x = layer(graph.adjacency @ (x if layer is model[0] else x.relu()))
        nn.functional.cross_entropy(x[:KNOWN], graph.labels[:KNOWN]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((x[KNOWN:].argmax(dim=1) == graph.labels[KNOWN:]).double().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    graph = make_graph()
    print(f"dense {accuracy(graph, spectral=False):.1%}, SST {accuracy(graph, spectral=True):.1%}")
