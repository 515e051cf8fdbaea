"""Ranks from gradients against a uniform rank of the same memory, on real text: ``python -m benchmarks.ranks``.

A small LLaMA takes the gradients of its first updates; ranks come from their sum
(:func:`lowrank_optim.allocate_ranks`), with the cost of GaLore's basis and moments. Then, from the same weights and on
the same batches, GaLoreAdamW trains with either. Writes ``results/ranks.json``: the share of the energy of a later
gradient that the leading subspaces of an earlier one hold, over all matrices, and the losses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, training
from lowrank_optim import GaLoreAdamW, allocate_ranks, low_rank_groups
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.steps import evaluate, loss_sum


def cost(shape: tuple[int, int]) -> int:
    """Values of basis and moments a rank."""
    return min(shape) + 2 * max(shape)


def prepared(options: argparse.Namespace, seed: int) -> training.Training:
    return training.prepare(
        Options(
            dataset=training.default_dataset(),
            model=options.model,
            optimizer="GaLoreAdamW",
            optimizer_args=[f"rank={options.budget}", f"update_proj_gap={options.gap}"],
            lr=options.lr,
            pack=True,
            seed=seed,
            max_steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            grad_clip=1.0,
        )
    )


def gradients(one: training.Training, first: int, count: int) -> dict[str, Tensor]:
    """The sum of the gradients of some micro-batches, of the hidden matrices."""
    names = low_rank_groups(one.model)[0]["param_names"]
    one.model.zero_grad()
    for batch, _ in islice(one.data.train(None), first, first + count):
        loss_sum(one.model, batch).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in one.model.named_parameters() if name in names and p.grad is not None}
    one.model.zero_grad()
    return found


def captured(basis_of: Mapping[str, Tensor], later: Mapping[str, Tensor], ranks: Mapping[str, int]) -> float:
    """The mean over matrices of the share of a later gradient's energy within the leading subspace of an earlier."""
    shares = []
    for name, rank in ranks.items():
        early, late = (grad if grad.shape[0] <= grad.shape[1] else grad.T for grad in (basis_of[name], later[name]))
        basis = torch.linalg.svd(early, full_matrices=False).U[:, :rank]
        shares.append(float((basis.T @ late).square().sum() / late.square().sum()))
    return statistics.fmean(shares)


def train(options: argparse.Namespace, ranks: Mapping[str, int], seed: int) -> dict[str, float]:
    """The losses of a run with these ranks."""
    one = prepared(options, seed)
    groups = low_rank_groups(one.model, rank=ranks)
    defaults: dict[str, Any] = {"lr": one.run.lr, "rank": options.budget, "update_proj_gap": options.gap}
    one = one._replace(optimizer=GaLoreAdamW(groups, **defaults))
    losses = [loss for _, loss in one.updates()]
    held_out = evaluate(
        one.model, one.data.validation(), limit=options.eval_batches, legacy=False, device=torch.device("cpu")
    )
    return {"train_loss": statistics.fmean(losses[-25:]), "validation_loss": held_out.loss}


def parameters(model: nn.Module, names: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (p.shape[0], p.shape[1]) for name, p in model.named_parameters() if name in names}


def run(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Both kinds of ranks."""
    one = prepared(options, seed)
    early = gradients(one, 0, options.gradients)
    late = gradients(one, options.gradients, options.gradients)
    rows = []
    for kind in ("uniform", "allocated"):
        ranks = dict.fromkeys(early, options.budget)
        if kind == "allocated":
            ranks = allocate_ranks(early, options.budget, cost=cost)
        values = sum(ranks[name] * cost(shape) for name, shape in parameters(one.model, ranks).items())
        row = {"ranks": kind, "seed": seed, "lowest": min(ranks.values()), "highest": max(ranks.values())}
        row |= {"state_values": values, "captured": captured(early, late, ranks), **train(options, ranks, seed)}
        print(row, flush=True)
        rows.append(row)
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="llama_9m", help="a preset or a LLaMA config.json")
    parser.add_argument("--budget", type=int, default=16, help="the uniform rank")
    parser.add_argument("--gradients", type=int, default=16, help="micro-batches of the gradients")
    parser.add_argument("--gap", type=int, default=25, help="updates between refreshes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-batches", type=int, default=40)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for seed in options.seeds:
            rows += run(options, seed)
            figures = {"run": {key: value for key, value in vars(options).items() if key != "seeds"}, "runs": rows}
            common.write_result("ranks", torch.device("cpu"), figures)
    except (UserError, RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks.ranks: error: {error}") from error


if __name__ == "__main__":
    main()
