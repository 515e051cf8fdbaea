"""One optimizer step and one refresh on the projected matrices of LLaMA, against bare GEMMs and the published code.

    python -m benchmarks.step [--models llama_60m] [--threads 2] [--budget 30]

writes ``results/step.json``: for every candidate the step time between refreshes (candidates take turns, so that a
busy moment hits all), its ratio to the floor of two bare GEMMs (project, back-project into the weight) and to
galore-torch, the state's bytes, those a parameter with moments of each dtype, and how many full-size tensors a step
creates for a matrix. For GaLoreAdamW also a refresh of each kind, and the slowest step of a staggered run. What is held
to a budget is printed beside it.

The published packages: ``pip install --no-deps --target .peers galore-torch==1.0 apollo-torch==1.0.3 fira==1.0.2`` and
``.peers`` on PYTHONPATH; who cannot be imported is left out.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import common, state_bytes
from benchmarks.baselines import LR, Candidate, candidates, every_svd_once, own_names
from benchmarks.budgets import budgets
from lowrank_optim import GaLoreAdamW
from lowrank_optim.optim.parts import Which
from lowrank_optim.optim.schedule import scheduled
from lowrank_optim.pretrain.llama import PRESETS

# The published ranks.
RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512}
FLOOR = "two GEMMs"
GALORE_TORCH = "galore-torch GaLoreAdamW"
REFRESHES = ("svd", "randomized", "power")
STAGGER_GAP = 200
# Rounds, however slow the machine is.
LEAST = 5
# Matrices of a layer.
LAYER = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """The projected matrices of a model, with gradients.

    ``grads`` are of shape (m, n) each and stay as they are; every layer has the values of the first.
    """

    name: str
    params: list[nn.Parameter]
    grads: list[Tensor]
    rank: int
    layers: int
    device: torch.device

    def give_gradients(self) -> None:
        """Hand every parameter its gradient: published code drops or replaces it."""
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad


def problem(model: str, rank: int | None, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random weights, and gradients with a decaying spectrum."""
    shape = PRESETS[model]
    rank = rank or RANKS.get(model) or shape.hidden // 4
    if not rank * shape.intermediate < shape.hidden**2:
        raise ValueError(f"Invalid rank: {rank}, expected one below hidden² / intermediate, or nothing is compressed")
    random = torch.Generator().manual_seed(0)
    layer = []
    for rows, columns in state_bytes.layer_shapes(model):
        inner = min(rows, columns)
        left = torch.randn(rows, inner, generator=random) * torch.arange(1, inner + 1) ** -0.7
        layer.append(((left @ torch.randn(inner, columns, generator=random)) * 1e-3).to(device, dtype))
    grads = [grad.clone() for _ in range(shape.layers) for grad in layer]
    params = [nn.Parameter((torch.randn(grad.shape, generator=random) * 0.02).to(device, dtype)) for grad in grads]
    return Problem(model, params, grads, rank, shape.layers, device)


def two_gemms(work: Problem) -> Callable[[], None]:
    """Project every gradient, back-project into the weight: nothing that projects can be faster."""
    prepared = []
    for p, grad in zip(work.params, work.grads, strict=True):
        wide = grad.shape[0] < grad.shape[1]
        weight, tall = (p.detach().mT, grad.mT) if wide else (p.detach(), grad)
        basis = torch.linalg.qr(torch.randn(tall.shape[1], work.rank)).Q.to(grad)
        prepared.append((weight, tall, basis, basis.mT, torch.empty(len(tall), work.rank).to(grad)))

    def run() -> None:
        for weight, tall, basis, back, low in prepared:
            torch.mm(tall, basis, out=low)
            weight.addmm_(low, back, alpha=-LR)

    return run


class Running(NamedTuple):
    """A candidate after its first step, which took so many seconds and created so many full-size tensors."""

    candidate: Candidate
    optimizer: Optimizer
    seconds: float
    created: int

    def step(self) -> None:
        self.optimizer.step()


def start(work: Problem, everyone: Sequence[Candidate]) -> tuple[list[Running], dict[str, str]]:
    """Build all and take the first step, which refreshes; who cannot is named with the reason.

    Raises:
        RuntimeError: one of them writes into the gradients.
    """
    running, left_out = [], {}
    memo: dict[Any, tuple[Tensor, ...]] = {}
    given = [grad.clone() for grad in work.grads[:LAYER]]
    with every_svd_once(memo):
        for candidate in everyone:
            work.give_gradients()
            try:
                optimizer = candidate.build(work.params[:LAYER] if candidate.once else work.params, work.rank)
                with common.NewTensors(_full_size(work)) as created:
                    seconds = common.timed(optimizer.step, work.device)
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                left_out[candidate.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if not all(torch.equal(a, b) for a, b in zip(given, work.grads)):
                raise RuntimeError(f"{candidate.name} wrote into the gradients, which all others read")
            running.append(Running(candidate, optimizer, seconds, created.count))
    return running, left_out


def full_size_temporaries(work: Problem, one: Running) -> float:
    """New tensors of a weight's size or more, a matrix and step."""
    if one.candidate.once:
        return one.created / LAYER
    work.give_gradients()
    with common.NewTensors(_full_size(work)) as created:
        one.step()
    return created.count / len(work.params)


def _full_size(work: Problem) -> int:
    """The smallest weight of the model; every low-rank tensor is smaller, see :func:`problem`."""
    return min(p.numel() for p in work.params)


def measure_steps(work: Problem, everyone: Sequence[Candidate], budget: float) -> dict[str, Any]:
    running, left_out = start(work, everyone)
    turns: dict[str, Callable[[], None]] = {FLOOR: two_gemms(work)}
    temporaries, state, planned = {}, {}, {}
    shapes, dtype = [p.shape for p in work.params], work.params[0].dtype
    stored, numel = str(dtype).removeprefix("torch."), sum(p.numel() for p in work.params)
    for one in running:
        name = one.candidate.name
        temporaries[name] = full_size_temporaries(work, one)
        state[name] = common.held_bytes(one.optimizer.state, exclude=[*work.params, *work.grads])
        if (own := name.partition("(")[0]) in own_names():
            planned[name] = state_bytes.planned(own, one.candidate.arguments, shapes, work.rank, dtype)
        if not one.candidate.once:
            turns[name] = one.step
    work.give_gradients()
    seconds = common.interleave(turns, work.device, budget=budget, least=LEAST)
    for one in running:
        if one.candidate.once:
            state[one.candidate.name] *= work.layers
            seconds[one.candidate.name] = [one.seconds * work.layers]
    floor, galore = seconds.pop(FLOOR), seconds.get(GALORE_TORCH)
    methods = {
        one.candidate.name: {
            "arguments": dict(one.candidate.arguments),
            "seconds": common.spread(seconds[one.candidate.name]),
            "to_floor": common.ratio(seconds[one.candidate.name], floor),
            "to_galore_torch": common.ratio(seconds[one.candidate.name], galore) if galore else None,
            "state_bytes": state[one.candidate.name],
            # Of another package, as it is.
            "state_bytes_a_parameter": planned.get(one.candidate.name, {stored: state[one.candidate.name] / numel}),
            "full_size_temporaries": temporaries[one.candidate.name],
        }
        for one in running
    }
    return {"floor_seconds": common.spread(floor), "methods": methods, "left_out": left_out}


def measure_refreshes(work: Problem, budget: float) -> dict[str, Any]:
    """Seconds to renew all bases by each method, from one layer, and their ratio to the exact SVD's."""
    params, grads = work.params[:LAYER], work.grads[:LAYER]
    turns = {}
    for kind in REFRESHES:
        optimizer = GaLoreAdamW(params, lr=LR, rank=work.rank, refresh=kind)
        turns[kind] = _refresh_of(optimizer, grads)
    with torch.no_grad():
        # No warm-up: the exact SVDs are most of the benchmark's time.
        seconds = common.interleave(turns, work.device, budget=budget, least=1, most=5, warmup=0)
    return {
        kind: {
            "seconds": common.spread([work.layers * s for s in seconds[kind]]),
            "svd_to_this": common.ratio(seconds["svd"], seconds[kind]),
        }
        for kind in REFRESHES
    }


def _refresh_of(optimizer: GaLoreAdamW, grads: Sequence[Tensor]) -> Callable[[], None]:
    group = optimizer.param_groups[0]
    work = []
    for p, grad in zip(group["params"], grads, strict=True):
        plan = optimizer.plan_of(p, group)
        subspace, state = plan.parts.subspace, plan.state
        assert subspace is not None
        # As if it had been trained: "power" starts from its previous basis.
        state["step"] = 1
        state["basis"].copy_(torch.linalg.qr(torch.randn(state["basis"].shape)).Q)
        work.append((subspace, subspace.orient(grad, state), state))

    def run() -> None:
        for subspace, tall, state in work:
            subspace.refresh(tall, state, group, Which())

    return run


def measure_stagger(work: Problem, budget: float) -> dict[str, Any]:
    """The slowest step of a staggered run over its median step.

    Which step that is follows from the schedule: the one with most to refresh. The two steps take turns.
    """
    optimizer = GaLoreAdamW(work.params, lr=LR, rank=work.rank, update_proj_gap=STAGGER_GAP, stagger=True)
    group = optimizer.param_groups[0]
    work.give_gradients()
    optimizer.step()

    def go_to(step: int) -> None:
        for p in work.params:
            optimizer.state[p]["step"] = step

    def refreshed(step: int) -> int:
        go_to(step)
        return sum(p.numel() for p in work.params if scheduled(optimizer.state[p], group, optimizer.entry(p).place))

    by_work = sorted(range(1, STAGGER_GAP + 1), key=refreshed)
    chosen = {"median": by_work[len(by_work) // 2], "slowest": by_work[-1]}

    def run(step: int) -> Callable[[], None]:
        def at_step() -> None:
            go_to(step)
            optimizer.step()

        return at_step

    seconds = common.interleave({k: run(s) for k, s in chosen.items()}, work.device, budget=budget, least=LEAST)
    return {
        "update_proj_gap": STAGGER_GAP,
        "steps": chosen,
        "refreshed_parameters": {k: refreshed(s) for k, s in chosen.items()},
        "seconds": {k: common.spread(s) for k, s in seconds.items()},
        "slowest_to_median": common.ratio(seconds["slowest"], seconds["median"]),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=["llama_60m"])
    parser.add_argument("--only", nargs="+", default=[], help="candidates whose names contain one of these")
    parser.add_argument("--rank", type=int, help="default: the published rank of the size")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        help=f"seconds of steps a model, at least {LEAST} rounds; refreshes and staggering take a third of it each",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--name", default="step", help="of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    everyone = [one for one in candidates() if not options.only or any(word in one.name for word in options.only)]
    models = {}
    for model in options.models:
        work = problem(model, options.rank, device, DTYPES[options.dtype])
        figures = {
            "rank": work.rank,
            "dtype": options.dtype,
            "matrices": len(work.params),
            "weight_bytes": sum(p.numel() * p.element_size() for p in work.params),
            **measure_steps(work, everyone, options.budget),
            "refresh": measure_refreshes(work, options.budget / 3),
            "stagger": measure_stagger(work, options.budget / 3),
        }
        models[model] = figures
        print(sheet(model, figures))
        del work
        gc.collect()
    print(common.write_result(options.name, device, {"models": models}))


def sheet(model: str, figures: dict[str, Any]) -> str:
    """The figures of one model for a terminal."""
    floor = figures["floor_seconds"]["median"]
    lines = [
        f"{model}, rank {figures['rank']}, {figures['matrices']} matrices; two GEMMs {1e3 * floor:.1f} ms",
        f"{'':52}{'ms':>9}{'/ GEMMs':>9}{'/ galore':>9}{'full-size':>10}  bytes of state a parameter, moments in "
        f"{' / '.join(state_bytes.STORED)}",
    ]
    for name, row in figures["methods"].items():
        galore = row["to_galore_torch"]
        lines.append(
            f"{name:52}{1e3 * row['seconds']['median']:9.1f}{row['to_floor']:9.2f}"
            f"{galore if galore is not None else float('nan'):9.2f}"
            f"{row['full_size_temporaries']:10.2f}  {state_bytes.cell(row['state_bytes_a_parameter'])}"
        )
    for name, reason in figures["left_out"].items():
        lines.append(f"{name:52} left out: {reason}")
    for kind, row in figures["refresh"].items():
        lines.append(f"refresh {kind:44}{1e3 * row['seconds']['median']:9.1f} ms, SVD / this {row['svd_to_this']:.1f}")
    lines += ["", *(budget.line() for budget in budgets(figures)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
