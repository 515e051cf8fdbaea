"""``lowrank-memory``: how much memory a training job takes."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowrank_optim import __version__
from lowrank_optim.cli import quiet  # noqa: F401
from lowrank_optim.memory import format, published
from lowrank_optim.memory.compare import all_methods, compare, table, write_csv, write_html, write_png
from lowrank_optim.memory.devices import STRATEGIES
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.format import UNITS
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.measure import measure
from lowrank_optim.memory.plan import Plan, available, command_line, parse_size, search
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.command_line import Parser, add_flags, check_ranges, parse_known, read_values
from lowrank_optim.pretrain.config import UserError, missing
from lowrank_optim.pretrain.llama import PRESETS
from lowrank_optim.pretrain.optimizers import parse_optimizer_args

MODELS = f"{', '.join(PRESETS)}, or a Hugging Face config.json or its folder"
SIZES = (*published.SIZES, "llama_7b")


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"lowrank-memory: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 2 with one line on stderr where the input is wrong."""
    # What was imported stays: going through it again would take the garbage collector a tenth of a plan's time.
    gc.freeze()
    try:
        parser = _parser()
        options = parse_known(parser, argv, MEMORY_OPTIONS)
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            answer = options.run(options)
            # Arguments may be anything that Python can write, a set for instance.
            print(json.dumps(answer, default=str) if isinstance(answer, Mapping) else answer)
    except SystemExit as end:
        # --help and --version
        return int(end.code or 0)
    except (UserError, ValueError, RuntimeError, OSError) as error:
        _warn(str(error))
        return 2
    except ModuleNotFoundError as error:
        _warn(str(missing(error)))
        return 2
    except KeyboardInterrupt:
        _warn("stopped")
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lowrank-memory", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lowrank-memory {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, options: Sequence[str] = ()) -> Parser:
        added: Parser = commands.add_parser(name, allow_abbrev=False, help=text, description=f"{text}. {UNITS}.")
        added.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
        add_flags(added, options, vars(Job()))
        added.set_defaults(run=run)
        return added

    one = ("config", *MEMORY_OPTIONS)
    command("estimate", _estimate, "Exact bytes of weights, gradients and optimizer state, in closed form", one)
    command("simulate", _simulate, "Peak memory of the real training step, run on tensors without data", one)
    text = "Peak memory of a real run on random weights and tokens, next to the two predictions"
    added = command("measure", _measure, text, one)
    added.add_argument("--updates", type=_positive, default=3, metavar="N", help="updates to run [3]")
    added.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    added.add_argument(
        "--checkpoint", metavar="DIR", help="save here, make one more update, and compare it with that of a resumed run"
    )
    several = [name for name in MEMORY_OPTIONS if name not in ("model", "optimizer")]
    added = command("compare", _compare, "All methods and model sizes side by side", several)
    added.add_argument("--model", nargs="+", dest="models", default=list(SIZES), help=f"{MODELS} [{' '.join(SIZES)}]")
    added.add_argument("--optimizer", nargs="+", dest="only", metavar="NAME", help="only these [all methods]")
    added.add_argument("--simulate", action="store_true", help="simulated peaks instead of the closed form")
    added.add_argument("--csv", metavar="FILE", help="write one line per method and model")
    added.add_argument("--png", metavar="FILE", help="write a stacked bar chart")
    added.add_argument("--html", metavar="FILE", help="write a page with the chart and the table")
    added = command("plan", _plan, "The fastest setting that fits a GPU, and the command that trains with it")
    added.add_argument("--model", required=True, help=MODELS)
    added.add_argument("--gpu", required=True, metavar="SIZE", help="memory of the GPU (24, 24GB, 22.5GiB) or its name")
    added.add_argument("--devices", type=_positive, default=1, metavar="N", help="GPUs that share an update [1]")
    added.add_argument(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        default=list(STRATEGIES),
        help="copies (ddp) or parts (fsdp) [both]",
    )
    added.add_argument("--simulate", action="store_true", help="check the plan by simulation (takes seconds)")
    added.add_argument("--tokens", type=_positive, default=131072, metavar="N", help="tokens per update [131072]")
    added.add_argument("--seq-len", type=_positive, default=256, metavar="N", help="tokens per sequence [256]")
    added.add_argument("--optimizer", nargs="+", default=[], metavar="NAME", help="only these [all]")
    command("papers", _papers, "The memory columns of published tables, recomputed, and how each was counted")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}, expected a positive int")
    return int(text)


def _job(options: argparse.Namespace, **more: str) -> Job:
    job = Job(**{**read_values(options), **more})
    check_ranges(job)
    return job


@contextmanager
def _written_by(flag: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Invalid --{flag}: cannot write {path} ({error.strerror})") from error


def _estimate(options: argparse.Namespace) -> Any:
    result = estimate(_job(options))
    return result.as_dict() if options.json else format.estimated(result)


def _simulate(options: argparse.Namespace) -> Any:
    job = _job(options)
    # To look for garbage takes a sixth of the time of an import as large as transformers'.
    gc.disable()
    try:
        peak = simulate(job)
    finally:
        gc.enable()
    return {**job.as_dict(), **asdict(peak)} if options.json else format.simulated(job, peak)


def _measure(options: argparse.Namespace) -> Any:
    import torch

    job = _job(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("Invalid --device: 'cuda', expected 'cpu' where torch sees no GPU")
    if options.checkpoint is not None:
        with _written_by("checkpoint", options.checkpoint):
            Path(options.checkpoint).mkdir(parents=True, exist_ok=True)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    expected, peak = estimate(job), simulate(job)
    runs = measure(job, updates=options.updates, device=device, checkpoint=options.checkpoint)
    if not options.json:
        return format.measured(job, expected, peak, runs)
    return {
        **job.as_dict(),
        **asdict(runs[0]),
        "estimate": expected.as_dict(),
        "simulate": asdict(peak),
        "resumed": asdict(runs[1]) if len(runs) > 1 else None,
    }


def _compare(options: argparse.Namespace) -> Any:
    job = _job(options, model=options.models[0], optimizer="AdamW")
    methods = all_methods()
    if options.only:
        methods = [(name, job.parameterization) for name in options.only]
    elif job.parameterization:
        # Of an unknown one the estimate says what there is.
        methods = [method for method in methods if method[1] == job.parameterization]
        methods = methods or [("AdamW", job.parameterization)]
    rows = compare(options.models, methods, parse_optimizer_args(job.optimizer_args), job, simulated=options.simulate)
    what = "Simulated peak" if options.simulate else "Weights, gradients and optimizer state"
    for flag, write in (("png", write_png), ("html", write_html), ("csv", write_csv)):
        if path := getattr(options, flag):
            with _written_by(flag, path):
                write(path, rows, f"{what}, {job.setting}")
    if options.json:
        return {"rows": [row._asdict() for row in rows]}
    return f"{what}, {job.setting}\n\n{table(rows)}\n\n{UNITS}."


def _plan(options: argparse.Namespace) -> Any:
    size = parse_size(options.gpu)
    with _progress() as progress:
        found = search(
            options.model, size, tokens=options.tokens, seq_len=options.seq_len, optimizers=options.optimizer,
            devices=options.devices, strategies=options.strategy, check=options.simulate, progress=progress,
        )  # fmt: skip
    if not options.json:
        return format.planned(size, found)
    best, following = (_as_dict(plan) if plan else None for plan in found[::2])
    return {
        "gpu_bytes": size,
        "available_bytes": available(size),
        "plan": best,
        "next": following,
        "by_optimizer": [_as_dict(other) for other in found.best_of],
    }


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {**plan.as_dict(), "command": command_line(plan.job, plan.devices)}


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; where that is no terminal, once a second."""
    last = [0.0]

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() > last[0] + 1:
            last[0] = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _papers(options: argparse.Namespace) -> Any:
    found = published.tables()
    return published.as_dict(found) if options.json else published.sheet(found)
