"""``lowrank-train generate`` and ``lowrank-train evaluate``: what a trained model says, and how well it predicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowrank_optim.cli.main import PROG
from lowrank_optim.pretrain.command_line import (
    FIELDS,
    Parser,
    add_flags,
    check_ranges,
    check_seed,
    parse_known,
    read_values,
)
from lowrank_optim.pretrain.config import Options, Resolved, UserError, user_errors

# The options of an evaluation; what is not given is the run's.
EVALUATED = ("dataset", "pack", "seq_len", "batch_size", "eval_batches", "legacy_eval", "chunked_loss")


def generate(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    parser = _parser("generate", "Continue a text with a trained model (temperature 0.8, the 50 likeliest tokens)")
    parser.add_argument("--prompt", default="The ", metavar="TEXT", help="the text to continue [The ]")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="maximum number of tokens [64]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed [0]")
    given = parse_known(parser, argv, ("prompt", "tokens", "seed", "path"))
    if given.tokens < 1:
        raise UserError(f"Invalid --tokens: {given.tokens}, expected a positive number")
    check_seed(given.seed)
    from lowrank_optim.pretrain.generate import sample

    model, tokenizer, _ = load(given.path)
    print(sample(model, tokenizer, given.prompt, tokens=given.tokens, seed=given.seed))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    parser = _parser("evaluate", "The validation loss of a trained model, by default on the data of its run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, EVALUATED)
    given = parse_known(parser, argv, (*EVALUATED, "json"))
    import torch

    from lowrank_optim.pretrain import steps
    from lowrank_optim.pretrain.data import load_data
    from lowrank_optim.pretrain.llama import plain_head

    model, tokenizer, run = load(given.path)
    if run is None and "dataset" not in vars(given):
        raise UserError(f"Invalid --dataset: None, expected one, as {given.path} is no checkpoint of a run")
    defaults = Resolved(
        seq_len=256, warmup_steps=0, grad_clip=0.0, max_steps=1, batch_size=8, accumulate=1, eval_every=0,
        eval_batches=0, save_every=0, restarts="none", pack=True,
    )  # fmt: skip
    run = replace(run or defaults, **{**read_values(given), "tokenizer": tokenizer.name_or_path})
    check_ranges(run)
    text = load_data(run, vocab_size=model.config.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = steps.evaluate(
        model.to(device), text.validation(), limit=run.eval_batches, legacy=run.legacy_eval, device=device,
        chunked=run.chunked_loss and plain_head(model),
    )  # fmt: skip
    if not found.tokens:
        raise UserError(f"Invalid dataset: {run.dataset} has no validation text")
    if given.json:
        print(json.dumps({**found._asdict(), "perplexity": found.perplexity, "dataset": run.dataset}))
    else:
        numbers = f"perplexity {found.perplexity:.2f} (loss {found.loss:.4f}, {found.tokens:,} tokens)"
        print(f"{run.dataset}: validation {numbers}")
    return 0


def _parser(name: str, text: str) -> Parser:
    parser = Parser(prog=f"{PROG} {name}", description=f"{text}.", allow_abbrev=False)
    parser.add_argument(
        "path", metavar="RUN", help="a run folder (its newest checkpoint), a checkpoint, or a model folder"
    )
    return parser


def load(path: str) -> tuple[Any, Any, Resolved | None]:
    """Model and tokenizer of a run, of a checkpoint or of another folder of a model, and the options of the run.

    Raises:
        UserError: nothing of the kind there, or files that are broken.
    """
    from lowrank_optim.pretrain import checkpoint
    from lowrank_optim.pretrain.build import DTYPES, build_network, settle
    from lowrank_optim.pretrain.llama import build_config, load_pretrained
    from lowrank_optim.pretrain.tokenization import load_tokenizer
    from lowrank_optim.pretrain.weight_files import FACTORED, WEIGHTS

    if not Path(path).is_dir():
        raise UserError(f"Invalid RUN: {path} is no folder, expected a run, a checkpoint or a model")
    there = [Path(path)] if (Path(path) / "config.json").is_file() else checkpoint.checkpoints(Path(path))
    if not there:
        raise UserError(f"Invalid RUN: {path} holds neither a model nor a complete checkpoint")
    found = there[-1]
    run = _options(found) if (found / checkpoint.STATE).is_file() else None
    with user_errors(ImportError):
        if run is None or (found / WEIGHTS).is_file() or not (found / FACTORED).is_file():
            config = build_config(str(found))
            model = load_pretrained(str(found), config, dtype=DTYPES[run.dtype if run else "fp32"])
        else:
            # Activations between the factors leave nothing that transformers could load.
            from safetensors.torch import load_model

            settled, config = settle(replace(run, init=None), config=build_config(str(found)))
            model = build_network(settled, config, "cpu")
            load_model(model, found / FACTORED)
    return model, load_tokenizer(str(found)), run


def _options(found: Path) -> Resolved:
    try:
        saved = json.loads((found / "state.json").read_text(encoding="utf-8"))["options"]
        known = {name: value for name, value in saved.items() if name in FIELDS}
        # An older version may not have known an option.
        return Resolved(**{**asdict(Options()), **known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"Broken checkpoint: {found / 'state.json'} ({error!r})") from error
