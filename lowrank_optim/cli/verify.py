"""``lowrank-train verify``: whether the checkpoints of a run are what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_optim.cli.main import PROG
from lowrank_optim.pretrain.command_line import Parser, parse_known


def verify(argv: Sequence[str]) -> int:
    """The subcommand; its status is 1 if a checkpoint is damaged."""
    parser = Parser(prog=f"{PROG} verify", description="Check every file of checkpoints.", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN", help="a run folder or a checkpoint")
    given = parse_known(parser, argv, ("path",))
    from lowrank_optim.pretrain.verify import verify as check

    return check(Path(given.path))
