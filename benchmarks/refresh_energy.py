"""How much of real gradients a refreshed basis captures, relative to the exact SVD, and at what time.

    python -m benchmarks.refresh_energy [--dataset FOLDER --tokenizer FOLDER] [--model llama_20m] [--gap 20]

trains a LLaMA with GaLoreAdamW, keeps the gradients of every refresh but the first together with the bases that stood
before it, and writes ``results/refresh_energy.json``: for each kind of refresh |G P|² / |G|² relative to the SVD's,
mean and worst matrix, and its time; "stale" is the old basis without a refresh.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common, training
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.parts import Group, State, Subspace, Which
from lowrank_optim.pretrain.config import Options, UserError

REFRESHES = ("svd", "randomized", "power")
KINDS = (*REFRESHES, "stale")


class Recorded(NamedTuple):
    """An oriented gradient in training, and the subspace's state as it stood before the refresh."""

    step: int
    tall: Tensor
    subspace: Subspace
    state: State

    def refreshed(self, kind: str, group: Group) -> Tensor:
        """The basis (d, rank) that a refresh of this kind makes of it; the state stays as it is."""
        state = {**self.state, "basis": self.state["basis"].clone()}
        self.subspace.refresh(self.tall, state, {**group, "refresh": kind}, Which())
        basis: Tensor = state["basis"]
        return basis

    def captured(self, basis: Tensor) -> float:
        """|G P|² / |G|²."""
        tall = self.tall.double()
        return float((tall @ basis.double()).square().sum() / tall.square().sum())


def record(options: argparse.Namespace) -> tuple[dict[str, Any], Group, list[Recorded]]:
    """Train; what the run was, the optimizer's low-rank group, and the gradients of its refreshes."""
    one = training.prepare(
        Options(
            dataset=options.dataset,
            tokenizer=options.tokenizer,
            model=options.model,
            optimizer="GaLoreAdamW",
            optimizer_args=[f"update_proj_gap={options.gap}"] + [f"rank={options.rank}"] * (options.rank is not None),
            pack=False,
            max_steps=options.steps,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            grad_clip=1.0,
        )
    )
    group = next(group for group in one.optimizer.param_groups if group["rank"] is not None)
    assert isinstance(one.optimizer, LowRankOptimizer)
    recorded: list[Recorded] = []
    losses = []
    for step, loss in one.updates():
        losses.append(loss)
        if step > 1 and (step - 1) % options.gap == 0:
            for p in group["params"]:
                plan = one.optimizer.plan_of(p, group)
                subspace = plan.parts.subspace
                assert subspace is not None
                kept = {**plan.state, "basis": plan.state["basis"].clone()}
                recorded.append(Recorded(step, subspace.orient(p.grad.clone(), kept), subspace, kept))
    loss_of = {"first": losses[0], "last": statistics.fmean(losses[-5:])}
    return {**training.about(one), "loss": loss_of}, group, recorded


def energies(recorded: Sequence[Recorded], group: Group) -> list[dict[str, Any]]:
    """For every refresh: what the SVD captures, and the others' shares of that."""
    rows = []
    for step in sorted({one.step for one in recorded}):
        at_step = [one for one in recorded if one.step == step]
        exact = [one.captured(one.refreshed("svd", group)) for one in at_step]
        row: dict[str, Any] = {"step": step, "matrices": len(at_step), "captured_by_svd": statistics.fmean(exact)}
        for kind in KINDS[1:]:
            shares = [
                one.captured(one.state["basis"] if kind == "stale" else one.refreshed(kind, group)) / best
                for one, best in zip(at_step, exact, strict=True)
            ]
            row[kind] = {"mean": statistics.fmean(shares), "worst": min(shares)}
        rows.append(row)
    return rows


def times(recorded: Sequence[Recorded], group: Group, budget: float) -> dict[str, Any]:
    """Seconds to refresh all matrices once, by kind, and the SVD's time over it."""

    def refresh_all(kind: str) -> Callable[[], None]:
        def run() -> None:
            for one in last:
                one.refreshed(kind, group)

        return run

    last = [one for one in recorded if one.step == recorded[-1].step]
    device = last[0].tall.device
    seconds = common.interleave({kind: refresh_all(kind) for kind in REFRESHES}, device, budget=budget, least=2, most=9)
    return {
        kind: {"seconds": common.spread(seconds[kind]), "svd_to_this": common.ratio(seconds["svd"], seconds[kind])}
        for kind in REFRESHES
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh_energy", description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default=training.default_dataset(), help="as train_llama.py takes it")
    parser.add_argument("--tokenizer", help="as train_llama.py takes it")
    parser.add_argument("--model", default="llama_20m", help="a preset or a LLaMA config.json")
    parser.add_argument("--rank", type=int, help="default: the recipe's for the model")
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--gap", type=int, default=20, help="updates between refreshes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing")
    parser.add_argument("--name", default="refresh_energy", help="of the JSON file")
    options = parser.parse_args(argv)
    if not 0 < options.gap < options.steps:
        parser.error(f"Invalid gap: {options.gap}, expected one in [1, steps), or there is no second refresh")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    try:
        about, group, recorded = record(options)
    except (UserError, RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks.refresh_energy: error: {error}") from error
    with torch.no_grad():
        rows = energies(recorded, group)
        timed = times(recorded, group, options.budget)
    for row in rows:
        shares = (f"{kind} {row[kind]['mean']:.4f} (worst {row[kind]['worst']:.4f})" for kind in KINDS[1:])
        print(f"step {row['step']}: SVD captures {row['captured_by_svd']:.4f}; of that {', '.join(shares)}")
    for kind, figures in timed.items():
        print(f"{kind}: {1e3 * figures['seconds']['median']:.1f} ms, SVD / this {figures['svd_to_this']:.1f}")
    print(common.write_result(options.name, torch.device("cpu"), {"run": about, "refreshes": rows, "times": timed}))


if __name__ == "__main__":
    main()
