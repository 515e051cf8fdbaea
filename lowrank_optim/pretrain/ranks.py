"""Ranks of a model's matrices from the gradients of its first update, for ``--ranks``.

    python -m lowrank_optim.pretrain.ranks --model llama_60m --dataset c4 --rank-budget 128 --out ranks.json
    python train_llama.py --model llama_60m --dataset c4 --ranks ranks.json

The ranks cost together what the budget as a uniform rank does; see :func:`lowrank_optim.allocate_ranks`. The other
flags are those of the trainer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lowrank_optim.optim.ranks import allocate_ranks
from lowrank_optim.optim.roles import HIDDEN, roles
from lowrank_optim.pretrain.build import build_network, settle
from lowrank_optim.pretrain.command_line import FIELDS, Parser, add_flags, check_ranges, parse_known, read_values
from lowrank_optim.pretrain.config import Options, UserError, user_errors
from lowrank_optim.pretrain.data import load_data
from lowrank_optim.pretrain.steps import loss_sum


def first_gradients(options: Options, device: torch.device | str) -> dict[str, Tensor]:
    """The gradients of the hidden matrices over all micro-batches of the first update.

    Raises:
        UserError: as the trainer raises it.
    """
    with user_errors(ImportError):
        run, config = settle(options)
        model = build_network(run, config, device)
    batches = load_data(run, vocab_size=config.vocab_size).train(None)
    for batch, _ in islice(batches, run.accumulate):
        loss_sum(model, batch.to(torch.device(device)), chunked=run.chunked_loss).backward()  # type: ignore[no-untyped-call]
    known = roles(model)
    return {
        name: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None and known[name] in HIDDEN and p.ndim == 2
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the ranks; 0 on success, 2 with one line on stderr where the input is wrong."""
    parser = Parser(prog="python -m lowrank_optim.pretrain.ranks", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rank-budget", type=int, required=True, metavar="R", help="the uniform rank of the same cost")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    add_flags(parser, FIELDS)
    try:
        given = parse_known(parser, argv, (*FIELDS, "rank_budget", "out"))
        options = check_ranges(Options(**read_values(given)))
        if options.parameterization or options.ranks or options.weights:
            raise UserError("Invalid options: the gradients of dense weights are wanted, leave --parameterization, "
                            "--weights and --ranks to the run")  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with user_errors(OSError):
            ranks = allocate_ranks(first_gradients(options, device), given.rank_budget)
            given.out.write_text(json.dumps(ranks, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"lowrank_optim.pretrain.ranks: error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {len(ranks)} ranks from {min(ranks.values())} to {max(ranks.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
