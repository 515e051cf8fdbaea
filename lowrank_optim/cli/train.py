"""``lowrank-train [train]``: options -> build -> loop -> evaluation -> report."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowrank_optim.cli.main import COMMANDS, PROG
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.config import Options, UserError, user_errors

if TYPE_CHECKING:
    from lowrank_optim.memory.estimate import Estimate

Sizes = tuple[str, str, Mapping[str, int]]


def train(argv: Sequence[str]) -> int:
    """The subcommand; see :func:`lowrank_optim.cli.main.main`."""
    others = "; ".join(f"{PROG} {name}: {text}" for name, (_, text) in COMMANDS.items())
    options = parse_options(argv, prog=PROG, epilog=f"Subcommands, each with a --help of its own: {others}.")
    return dry_run(options) if options.dry_run else run(options)


def dry_run(options: Options) -> int:
    """``--dry-run``: what would be trained and how, without data, memory or files."""
    from lowrank_optim.pretrain import report
    from lowrank_optim.pretrain.build import build, restarts_for

    world = int(os.environ.get("WORLD_SIZE", "1"))
    parts = world if options.fsdp else 1
    with user_errors(ImportError):
        settled, config, model, optimizer = build(options, "meta", processes=world)
        restarts_for(settled, model, optimizer)
        (expected, kept), reference = predicted(options, parts), adamw_sizes(options, parts)
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(report.banner(settled, config, model, world=world, device="meta (dry run)"))
    print("\n" + report.method_table(optimizer, model) + "\n")
    print(report.memory_table([(settled.optimizer, expected.state_dtype, kept), *reference]))
    if len(expected.gradients_by_kind) > 1 and parts == 1:
        kinds = (f"{kind} {size / 2**20:,.1f} MiB" for kind, size in expected.gradients_by_kind.items() if size)
        print(f"Gradients: {', '.join(kinds)}.")
    if parts == 1:
        print("Predicted to the byte; activations are not included.")
    else:
        print(f"Predicted for one of {parts} processes; activations and what is gathered for them are not included.")
    return 0


def run(options: Options) -> int:
    """The run itself."""
    started = time.perf_counter()
    from lowrank_optim.pretrain import report
    from lowrank_optim.pretrain.generate import sample
    from lowrank_optim.pretrain.launch import own, run_folder
    from lowrank_optim.pretrain.run_page import write_page
    from lowrank_optim.pretrain.trainer import Trainer

    folder = run_folder(options)
    with own(folder):
        trainer = Trainer(options, folder)
        status = trainer.train()
    if status == 0 and trainer.leads and trainer.sizes:
        settled = trainer.run
        from lowrank_optim.memory.estimate import state_dtype

        measured = (f"{settled.optimizer}, measured", state_dtype(trainer.optimizer), trainer.sizes)
        memory = report.memory_table([measured, *adamw_sizes(options, trainer.world if trainer.sharded else 1)])
        seconds = time.perf_counter() - started
        summary = report.summary(trainer.progress, trainer.evaluated, trainer.folder, seconds=seconds)
        trainer.say(f"\n{memory}\n\n{summary}")
        text = ""
        if settled.sample_tokens and not trainer.sharded:
            prompt = settled.sample_prompt or ("def " if settled.dataset == "stdlib" else "The ")
            try:
                text = sample(
                    trainer.model, trainer.text.tokenizer, prompt, tokens=settled.sample_tokens, seed=settled.seed
                )
                trainer.say("\nsample:\n" + text)
            except UserError as error:
                trainer.say(f"warning: no sample of the model: {error}")
        with user_errors(OSError):
            page = write_page(trainer.folder, memory=memory, summary=summary, sample=text)
        trainer.say(f"report {page}")
    return status


def predicted(options: Options, parts: int) -> tuple[Estimate, Mapping[str, int]]:
    """Of the whole run, and the bytes that the first of the processes keeps that its model is split over."""
    from lowrank_optim.memory.devices import Devices, footprint
    from lowrank_optim.memory.estimate import estimate

    expected = estimate(options)
    if parts == 1:
        return expected, expected.by_category
    part = footprint(options, Devices(parts, "fsdp"))
    return expected, {"weights": part.weights, "gradients": part.gradients, "optimizer": part.optimizer}


def adamw_sizes(options: Options, parts: int = 1) -> list[Sizes]:
    """What AdamW keeps, predicted, for the same model with dense weights: states as torch has them, and in fp32."""
    # Ours without a rank keeps what torch's does, and is made in half the time.
    plain = replace(options, optimizer="GaLoreAdamW", per_layer=False, graph_step=False)
    dtypes = ["float32"] if options.dtype == "fp32" else ["bfloat16", "float32"]
    if options.optimizer == "AdamW":
        dtypes = dtypes[1:]
    else:
        plain = replace(plain, parameterization=None, parameterization_args=[], weights=None)
    rows = [replace(plain, optimizer_args=["rank=none", f"state_dtype={dtype}"]) for dtype in dtypes]
    found = [predicted(row, parts) for row in rows]
    return [("AdamW, same model", expected.state_dtype, kept) for expected, kept in found]
