"""``lowrank-memory``: how much memory a training job takes."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from lowrank_optim.memory.plan import Estimate, estimate
from lowrank_optim.pretrain.llama import PRESETS
from lowrank_optim.pretrain.optimizers import (
    accepted_arguments,
    low_rank_names,
    nearest,
    optimizer_names,
    parse_optimizer_args,
)
from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNITS = "GB = 10^9 bytes, GiB = 2^30 bytes"


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
            print(options.run(options))
    except (ValueError, RuntimeError) as error:
        _warn(str(error))
        return 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="lowrank-memory", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    estimating = commands.add_parser(
        "estimate",
        allow_abbrev=False,
        help="exact bytes of weights, gradients and optimizer state, without allocating them",
        description="Exact bytes of weights, gradients and optimizer state, from the optimizer's own state "
        f"initialisation on the meta device. {UNITS}.",
    )
    estimating.add_argument(
        "--model", required=True, help=f"{', '.join(PRESETS)}, or a Hugging Face config.json or its folder"
    )
    method = estimating.add_mutually_exclusive_group(required=True)
    method.add_argument("--optimizer", metavar="NAME", help="a class of lowrank_optim, torch.optim or bitsandbytes")
    method.add_argument(
        "--compare",
        nargs="*",
        metavar="NAME",
        help="a table of these optimizers; without names, of all low-rank ones and AdamW. "
        "An argument goes to every optimizer that has it",
    )
    estimating.add_argument("--optimizer-args", nargs="+", default=[], metavar="KEY=VALUE", help="such as rank=1024")
    estimating.add_argument("--parameterization", metavar="NAME", help=", ".join(PARAMETERIZATIONS))
    estimating.add_argument(
        "--parameterization-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="such as rank=128; what is not given takes the value published for the model's size",
    )
    estimating.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and gradients (default bf16)")
    estimating.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    estimating.set_defaults(run=_estimate)
    return parser


def _estimate(options: argparse.Namespace) -> str:
    args = parse_optimizer_args(options.optimizer_args)
    dtype = DTYPES[options.dtype]
    layers = parse_optimizer_args(options.parameterization_args, "parameterization")
    if layers and options.parameterization is None:
        raise ValueError("Invalid --parameterization-args: they need --parameterization")
    where = Where(options.model, dtype, options.parameterization, layers)
    if options.compare is None:
        result = where.estimate(options.optimizer, args)
        return _json(result.as_dict()) if options.json else _sheet(result)
    results = _compare(where, options.compare, args)
    return _json({"estimates": [result.as_dict() for result in results]}) if options.json else _table(results)


class Where(NamedTuple):
    """What an optimizer is estimated on."""

    model: str
    dtype: torch.dtype
    parameterization: str | None
    parameterization_args: Mapping[str, Any]

    def estimate(self, optimizer: str, args: Mapping[str, Any]) -> Estimate:
        return estimate(self.model, optimizer, args, self.dtype, self.parameterization, self.parameterization_args)


def _compare(where: Where, names: Sequence[str], args: Mapping[str, Any]) -> list[Estimate]:
    if not names:
        known = optimizer_names()
        names = [*(name for name in ("AdamW", "AdamW8bit") if name in known), *low_rank_names()]
    accepted = {name: accepted_arguments(name) for name in names}
    anywhere = set().union(*accepted.values())
    for key in args:
        if key not in anywhere:
            raise ValueError(
                f"Invalid argument: {key!r}, expected an argument of {', '.join(names)}" + nearest(key, anywhere)
            )
    return [where.estimate(name, {k: v for k, v in args.items() if k in keys}) for name, keys in accepted.items()]


def _json(answer: Mapping[str, Any]) -> str:
    # Arguments may be anything that Python can write, a set for instance.
    return json.dumps(answer, default=str)


def _sheet(result: Estimate) -> str:
    share = 100 * result.low_rank_parameters / result.parameters
    lines = [
        f"{_model(result)}, {_method(result)}, {result.dtype}",
        f"{result.parameters:,} parameters, {result.low_rank_parameters:,} of them low-rank ({share:.1f} %)",
        "",
        f"{'':18}{'bytes':>20}{'GB':>10}{'GiB':>10}",
    ]
    for category, size in result.by_category.items():
        if category in result.not_included:
            lines.append(f"{category:18}{'not estimated':>20}")
            continue
        lines.append(f"{category:18}{_sizes(size)}")
        if category == "weights" and result.index_bytes:
            lines.append(f"  {'of which index':16}{_sizes(result.index_bytes)}")
        if category == "optimizer":
            lines += [f"  {key:16}{_sizes(part)}" for key, part in result.optimizer_by_key.items()]
    lines += [f"{'total':18}{_sizes(result.total_bytes)}", "", f"{UNITS}."]
    return "\n".join(lines)


def _table(results: Sequence[Estimate]) -> str:
    first = results[0]
    width = max(len(_method(result)) for result in results)
    columns = ("weights", "gradients", "optimizer", "total")
    lines = [
        f"{_model(first)}, {first.parameters:,} parameters, {first.dtype}; GB (GiB)",
        "",
        f"{'':{width}}" + "".join(f"{column:>18}" for column in columns),
    ]
    for result in results:
        sizes = [*(result.by_category[column] for column in columns[:-1]), result.total_bytes]
        cells = "".join(f"{f'{size / 1e9:.3f} ({size / 2**30:.3f})':>18}" for size in sizes)
        lines.append(f"{_method(result):{width}}{cells}")
    return "\n".join([*lines, "", f"{UNITS}. Not estimated: {', '.join(first.not_included)}."])


def _model(result: Estimate) -> str:
    if result.parameterization is None:
        return result.model
    return f"{result.model} as {_call(result.parameterization, result.parameterization_args)}"


def _method(result: Estimate) -> str:
    return _call(result.optimizer, result.optimizer_args)


def _call(name: str, args: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})"


def _sizes(size: int) -> str:
    return f"{size:>20,}{size / 1e9:>10.3f}{size / 2**30:>10.3f}"
