"""``tokenize``: text as token ids on disk, which ``--dataset`` takes instead of the text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_optim.pretrain import tokens
from lowrank_optim.pretrain.command_line import Parser, add_flags, check_ranges, parse_known
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.sources import Saved, open_source
from lowrank_optim.pretrain.tokenization import BPE_VOCAB

# Those of a run that say which text it reads.
FLAGS = ("dataset", "text_field", "tokenizer", "max_bad_documents", "allow_changed_data")


def main(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    parser = Parser(
        prog="lowrank-train tokenize",
        allow_abbrev=False,
        description="Encode a data set once: with its tokens on disk, training waits neither for files nor for the "
        "tokenizer, on any number of processes. A call that breaks off continues where it was.",
    )
    add_flags(parser, FLAGS)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="folder to create")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after about this many training tokens")
    given = vars(parse_known(parser, argv, (*FLAGS, "output_dir", "max_tokens")))
    try:
        made = run(given.pop("output_dir"), given.pop("max_tokens"), **given)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same call continues", file=sys.stderr)
        return 130
    for split in tokens.SPLITS:
        print(f"{split:<10} {made[split]['documents']:,} documents, {made[split]['tokens']:,} tokens")
    return 0


def run(folder: Path, limit: int | None, **values: Any) -> dict[str, Any]:
    """Write the tokens of a data set; returns the manifest of the folder.

    Raises:
        UserError: what the user can correct. What has been encoded so far is kept for the next call.
    """
    from tqdm import tqdm

    options = check_ranges(Options(**values))
    if options.dataset == "stdlib" or tokens.is_token_folder(options.dataset):
        raise UserError(f"Invalid dataset: {options.dataset}, expected text on disk or on the hub")
    if limit is not None and limit < 1:
        raise UserError(f"Invalid max_tokens: {limit}, expected a positive number")
    if folder.exists():
        raise UserError(f"Invalid output_dir: {folder} exists")
    partial = tokens.partial_folder(folder)
    begun = tokens.read_progress(partial) if options.allow_changed_data else None
    # What was begun keeps its tokenizer and what it holds out.
    saved = Saved(begun["source"], partial) if begun else None
    source = open_source(options, vocab_size=BPE_VOCAB, show=True, saved=saved)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Invalid output_dir: cannot write {folder} ({error.strerror})") from error
    print(source.description)
    splits = {"train": replace(source.training, loop=False), "validation": source.held_out}
    # Neither a file's time of change nor how many faults are allowed makes it another text.
    about = {**source.fingerprint, "files": {name: stamp[:2] for name, stamp in source.fingerprint["files"].items()}}
    with tqdm(unit=" tokens", unit_scale=True, mininterval=0.5, total=source.amount and source.amount.tokens) as bar:
        return tokens.write_tokens(
            folder, splits, source.tokenizer, about, changed=saved is not None, limit=limit, said=bar.update
        )
