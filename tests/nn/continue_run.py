"""Continues a saved run in a process of its own: continue_run.py VARIANT FILE, prints the losses as hex floats."""

from __future__ import annotations

import sys

import torch

from lowrank_optim.nn import convert
from tests.nn.parameterizations import VARIANTS, block, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    variant, path = sys.argv[1:]
    saved = torch.load(path, weights_only=True)
    model = block()
    # Another seed: whatever does not come from the file shows.
    convert(model, VARIANTS[variant].options, seed=99)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(*(loss.hex() for loss in train(model, optimizer, 100, 5)))
