"""Continues saved runs in a process of its own: continue_run.py FILE, prints a JSON object of losses as hex floats."""

from __future__ import annotations

import json
import sys

import torch

from lowrank_optim.nn import convert
from tests.nn.parameterizations import MORE, VARIANTS, block, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = {}
    for name, saved in torch.load(sys.argv[1], weights_only=True).items():
        model = block()
        # Another seed: whatever does not come from the file shows.
        convert(model, VARIANTS[name].options, seed=99)
        optimizer = VARIANTS[name].optimizer(model)
        restarts = VARIANTS[name].restarts(model, optimizer)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for restart, state in zip(restarts, saved["restarts"], strict=True):
            restart.load_state_dict(state)
        losses[name] = [loss.hex() for loss in train(model, optimizer, 100, MORE, restarts)]
    print(json.dumps(losses))
