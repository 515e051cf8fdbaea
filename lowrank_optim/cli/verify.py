"""``lowrank-train verify``: whether the checkpoints of a run are what was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowrank_optim.cli.main import PROG
from lowrank_optim.pretrain.command_line import Parser, parse_known
from lowrank_optim.pretrain.config import UserError


def verify(argv: Sequence[str]) -> int:
    """The subcommand: a line for every checkpoint; its status is 1 if one is damaged."""
    parser = Parser(prog=f"{PROG} verify", description="Check every file of checkpoints.", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN", help="a run folder or a checkpoint")
    folder = Path(parse_known(parser, argv, ("path",)).path)
    from lowrank_optim.pretrain import checkpoint

    found = [folder] if (folder / checkpoint.STATE).is_file() else checkpoint.numbered(folder)
    if not found:
        raise UserError(f"Invalid folder: {folder} is no checkpoint and holds none")
    reasons = {path: checkpoint.damage(path) for path in found}
    for path, reason in reasons.items():
        if reason:
            print(f"{path}: BROKEN, {reason}")
        elif files := json.loads((path / checkpoint.STATE).read_text(encoding="utf-8")).get("files"):
            print(f"{path}: whole, {len(files)} files, {sum(file['size'] for file in files.values()):,} bytes")
        else:
            print(f"{path}: complete, of a version without digests")
    return int(any(reasons.values()))
