"""``lowrank-train``: train, and what comes after."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lowrank_optim import __version__
from lowrank_optim.cli import quiet  # noqa: F401
from lowrank_optim.optim.validation import nearest
from lowrank_optim.pretrain.config import UserError, missing

PROG = "lowrank-train"
# Subcommands: the module and the function, imported when called, and what they do.
COMMANDS = {
    "train": ("lowrank_optim.cli.train:train", "train a model; the default, which can be left out"),
    "generate": ("lowrank_optim.cli.saved:generate", "continue a text with a trained model"),
    "evaluate": ("lowrank_optim.cli.saved:evaluate", "compute the validation loss of a trained model"),
    "compare": ("lowrank_optim.cli.compare:compare", "compare runs: a table, and a page with plots"),
    "verify": ("lowrank_optim.cli.verify:verify", "check the checkpoints of a run against their digests"),
    "tokenize": ("lowrank_optim.pretrain.tokenize_command:main", "encode a data set as token ids on disk"),
    "list": ("lowrank_optim.cli.listing:list_", "list models, optimizers and parameterizations with their arguments"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 for what the user can correct, 128 + signal when told to stop."""
    line = list(sys.argv[1:] if argv is None else argv)
    if line[:1] == ["--version"]:
        print(f"{PROG} {__version__}")
        return 0
    command = line.pop(0) if line and line[0] in COMMANDS else "train"
    with warnings.catch_warnings():
        warnings.showwarning = say_warning  # type: ignore[assignment]
        try:
            if command == "train" and line and not line[0].startswith("-"):
                near = nearest(line[0], COMMANDS)
                raise UserError(f"Invalid command: {line[0]!r}, expected one of {', '.join(COMMANDS)}{near}")
            module, _, function = COMMANDS[command][0].partition(":")
            status: int = getattr(importlib.import_module(module), function)(line)
            return status
        except SystemExit as end:
            # --help
            return int(end.code or 0)
        except UserError as error:
            print(f"{PROG}: error: {error}", file=sys.stderr)
        except ModuleNotFoundError as error:
            print(f"{PROG}: error: {missing(error)}", file=sys.stderr)
        except BrokenPipeError:
            # Who reads has seen enough; nothing may be written at the end either.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            kept = "; saved checkpoints are intact" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            print(f"{PROG}: error: {error}{kept}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"{PROG}: interrupted; saved checkpoints are intact", file=sys.stderr)
            return 128 + signal.SIGINT
    return 2


def say_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """One line for what this package warns of; other libraries' hints to their own callers are not for users."""
    if "lowrank_optim" in filename or category is UserWarning or category is RuntimeWarning:
        print(f"{PROG}: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
