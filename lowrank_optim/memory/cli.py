"""``lowrank-memory``: how much memory a training job takes."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lowrank_optim.memory import papers, sheets
from lowrank_optim.memory.compare import all_methods, as_csv, compare, table, write_html, write_png
from lowrank_optim.memory.job import DTYPES, Job
from lowrank_optim.memory.measure import measure
from lowrank_optim.memory.plan import WEIGHTS
from lowrank_optim.memory.search import available, command_line, parse_size, search
from lowrank_optim.memory.sheets import UNITS
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.llama import PRESETS
from lowrank_optim.pretrain.optimizers import parse_optimizer_args
from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

MODELS = f"{', '.join(PRESETS)}, or a Hugging Face config.json or its folder"
SIZES = (*papers.SIZES, "llama_7b")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print its usage first; here a wrong line gets one line of answer.
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"lowrank-memory: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 2 with one line on stderr where the input is wrong."""
    try:
        options = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            answer = options.run(options)
            # Arguments may be anything that Python can write, a set for instance.
            print(json.dumps(answer, default=str) if isinstance(answer, Mapping) else answer)
    except (ValueError, RuntimeError) as error:
        _warn(str(error))
        return 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="lowrank-memory", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> _Parser:
        added: _Parser = commands.add_parser(name, allow_abbrev=False, help=text, description=f"{text}. {UNITS}.")
        added.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
        added.set_defaults(run=run)
        return added

    added = command("estimate", _estimate, "Exact bytes of weights, gradients and optimizer state, in closed form")
    _add_job(added)
    added = command("simulate", _simulate, "Peak of the real training step, run on tensors without data")
    _add_job(added)
    added = command("measure", _measure, "Peak of a run with random weights and tokens, beside the two predictions")
    _add_job(added)
    added.add_argument("--updates", type=_positive, default=3, metavar="N", help="updates to run (default 3)")
    added.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    added.add_argument(
        "--checkpoint", metavar="DIR", help="save after these updates, and compare one update more with a resumed run's"
    )
    added = command("compare", _compare, "All methods and sizes side by side")
    added.add_argument("--model", nargs="+", default=list(SIZES), help=f"{MODELS} (default {' '.join(SIZES)})")
    added.add_argument("--optimizer", nargs="+", metavar="NAME", help="only these (default all methods)")
    _add_arguments(added)
    _add_sizes(added)
    added.add_argument("--simulate", action="store_true", help="simulated peaks instead of the closed form")
    added.add_argument("--csv", metavar="FILE", help="write a line a method and model")
    added.add_argument("--png", metavar="FILE", help="write stacked bars")
    added.add_argument("--html", metavar="FILE", help="write one page with the bars and the table")
    added = command("plan", _plan, "The fastest plan that fits a GPU, and the command line that runs it")
    added.add_argument("--model", required=True, help=MODELS)
    added.add_argument("--gpu", required=True, metavar="SIZE", help="memory of the GPU, such as 24GB or 22.5GiB")
    added.add_argument(
        "--tokens", type=_positive, default=131072, metavar="N", help="of an update (default 131072, as published)"
    )
    added.add_argument("--seq-len", type=_positive, default=256, metavar="N", help="tokens of a sequence")
    added.add_argument("--optimizer", nargs="+", default=[], metavar="NAME", help="only these (default all)")
    command("papers", _papers, "The published memory columns, recomputed, and the way of counting that gives them")
    return parser


def _add_job(parser: _Parser) -> None:
    parser.add_argument("--model", required=True, help=MODELS)
    parser.add_argument(
        "--optimizer", required=True, metavar="NAME", help="a class of lowrank_optim, torch.optim or bitsandbytes"
    )
    _add_arguments(parser)
    _add_sizes(parser)


def _add_arguments(parser: _Parser) -> None:
    parser.add_argument("--optimizer-args", nargs="+", default=[], metavar="KEY=VALUE", help="such as rank=1024")
    parser.add_argument("--parameterization", metavar="NAME", help=", ".join(PARAMETERIZATIONS))
    parser.add_argument(
        "--parameterization-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="such as rank=128; what is not given takes the value published for the model's size",
    )


def _add_sizes(parser: _Parser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of weights, gradients and activations (default bf16)"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="bf16", help="int8: attention and MLP matrices in 8 bits (default bf16)"
    )
    parser.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="sequences of a micro-batch")
    parser.add_argument("--seq-len", type=_positive, default=256, metavar="N", help="tokens of a sequence")
    parser.add_argument("--accumulate", type=_positive, default=1, metavar="N", help="micro-batches of an update")
    parser.add_argument(
        "--accumulate-dtype", choices=("fp32", "bf16"), default="fp32", help="of sums at low rank (default fp32)"
    )
    parser.add_argument("--per-layer", action="store_true", help="update each parameter during backward")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}, expected a positive int")
    return value


def _job(options: argparse.Namespace, model: str, optimizer: str) -> Job:
    layers = parse_optimizer_args(options.parameterization_args, "parameterization")
    if layers and options.parameterization is None:
        raise ValueError("Invalid --parameterization-args: they need --parameterization")
    return Job(
        model=model,
        optimizer=optimizer,
        optimizer_args=parse_optimizer_args(options.optimizer_args),
        parameterization=options.parameterization,
        parameterization_args=layers,
        dtype=options.dtype,
        weights=options.weights,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        accumulate=options.accumulate,
        accumulate_dtype=options.accumulate_dtype,
        per_layer=options.per_layer,
        checkpointing=options.checkpointing,
    )


def _estimate(options: argparse.Namespace) -> Any:
    result = _job(options, options.model, options.optimizer).estimate()
    return result.as_dict() if options.json else sheets.estimated(result)


def _simulate(options: argparse.Namespace) -> Any:
    job = _job(options, options.model, options.optimizer)
    peak = simulate(job)
    return {**job.as_dict(), **peak.as_dict()} if options.json else sheets.simulated(job, peak)


def _measure(options: argparse.Namespace) -> Any:
    import torch

    job = _job(options, options.model, options.optimizer)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    expected, peak = job.estimate(), simulate(job)
    runs = measure(job, updates=options.updates, device=device, checkpoint=options.checkpoint)
    if not options.json:
        return sheets.measured(job, expected, peak, runs)
    return {
        **job.as_dict(),
        **runs[0].as_dict(),
        "estimate": expected.as_dict(),
        "simulate": peak.as_dict(),
        "resumed": runs[1].as_dict() if len(runs) > 1 else None,
    }


def _compare(options: argparse.Namespace) -> Any:
    methods = all_methods()
    if options.optimizer:
        methods = [(name, options.parameterization) for name in options.optimizer]
    elif options.parameterization:
        methods = [(name, layers) for name, layers in methods if layers == options.parameterization]
    job = _job(options, options.model[0], methods[0][0])
    rows = compare(options.model, methods, job.optimizer_args, job, simulated=options.simulate)
    what = "Simulated peak" if options.simulate else "Weights, gradients and optimizer state"
    for path, write in ((options.png, write_png), (options.html, write_html)):
        if path:
            write(path, rows, f"{what}, {job.setting}")
    if options.csv:
        with open(options.csv, "w", encoding="utf-8") as file:
            file.write(as_csv(rows))
    if options.json:
        return {"rows": [row._asdict() for row in rows]}
    return f"{what}, {job.setting}\n\n{table(rows)}\n\n{UNITS}."


def _plan(options: argparse.Namespace) -> Any:
    size = parse_size(options.gpu)
    plan, others = search(
        options.model, size, tokens=options.tokens, seq_len=options.seq_len, optimizers=options.optimizer
    )
    if not options.json:
        return sheets.planned(size, plan, others)
    return {
        "gpu_bytes": size,
        "available_bytes": available(size),
        "plan": plan and {**plan.as_dict(), "command": command_line(plan.job)},
        "by_optimizer": [other.as_dict() for other in others],
    }


def _papers(options: argparse.Namespace) -> Any:
    found = papers.tables()
    return papers.as_dict(found) if options.json else papers.sheet(found)
