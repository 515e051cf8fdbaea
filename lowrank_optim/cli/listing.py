"""``lowrank-train list``: what can be chosen, with its arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lowrank_optim.cli.main import PROG
from lowrank_optim.pretrain.command_line import CONFIGS, Parser, parse_known


def list_(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    parser = Parser(prog=f"{PROG} list", description="What can be chosen.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parse_known(parser, argv, ("json",))
    found = everything()
    if given.json:
        print(json.dumps(found))
        return 0
    lines = ["models (--model)"]
    lines += [
        f"  {name:12} {', '.join(f'{k} {v}' for k, v in shape.items())}" for name, shape in found["models"].items()
    ]
    lines += ["  or a config.json, its folder or a hub name of any causal language model of transformers", ""]
    for kind, flag in (("optimizers", "--optimizer"), ("parameterizations", "--parameterization")):
        lines.append(f"{kind} ({flag} NAME {flag}-args K=V)")
        lines += [f"  {name:20} {' '.join(args)}" for name, args in found[kind].items()]
        lines.append("")
    lines.append(f"configurations (--config NAME)\n  {', '.join(found['configurations'])}")
    print("\n".join(lines))
    return 0


def everything() -> dict[str, Any]:
    """Models with their shapes, optimizers and parameterizations with their arguments, names of configurations."""
    from lowrank_optim.pretrain.llama import PRESETS
    from lowrank_optim.pretrain.optimizers import accepted_arguments, optimizer_names
    from lowrank_optim.pretrain.parameterizations import PARAMETERIZATIONS

    fields: Any = dataclasses.fields
    layers = {name: [field.name for field in fields(cls)] for name, cls in PARAMETERIZATIONS.items()}
    return {
        "models": {name: shape._asdict() for name, shape in PRESETS.items()},
        "optimizers": {name: accepted_arguments(name) for name in optimizer_names()},
        "parameterizations": {name: [*names, "targets", "hidden_act"] for name, names in layers.items()},
        "configurations": sorted(path.stem for path in CONFIGS.glob("*.yaml")),
    }
