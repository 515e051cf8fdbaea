#!/usr/bin/env python3
"""Pretrain a LLaMA with a low-rank optimizer: options -> build -> loop -> evaluation -> report.

    python train_llama.py                                             # minutes on two CPU cores, offline
    accelerate launch train_llama.py --dataset c4 --model llama_60m --dtype bf16

A run folder holds config.yaml, metrics.jsonl and checkpoint-N folders, each of which
``LlamaForCausalLM.from_pretrained`` loads and ``--resume`` continues to the last bit.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch starts its threads: where other programs want the cores too, threads that wait by spinning make an
# update 3 times slower (measured on 2 cores); alone it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.config import Options, UserError, user_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when done, 2 for what the user can correct, 128 + signal when told to stop, 75 when ``--max-time`` was up.
    """
    line = sys.argv[1:] if argv is None else argv
    try:
        if line[:1] == ["verify"]:
            return verify(line[1:])
        options = parse_options(line)
        return dry_run(options) if options.dry_run else train(options)
    except SystemExit as end:
        # --help
        return int(end.code or 0)
    except UserError as error:
        print(f"train_llama.py: error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"train_llama.py: error: {error}; saved checkpoints are intact", file=sys.stderr)
    except KeyboardInterrupt:
        print("train_llama.py: interrupted; saved checkpoints are intact", file=sys.stderr)
        return 128 + signal.SIGINT
    return 2


def verify(folders: Sequence[str]) -> int:
    """``verify DIR``: whether the checkpoints of a run are what was written; 1 where one is not."""
    from lowrank_optim.pretrain import verify

    if len(folders) != 1:
        raise UserError(f"Invalid arguments: {' '.join(folders) or 'none'}, expected verify DIR")
    return verify.verify(Path(folders[0]))


def dry_run(options: Options) -> int:
    """``--dry-run``: what would be trained and how, without data, memory or files."""
    from lowrank_optim.memory.estimate import estimate
    from lowrank_optim.pretrain import report
    from lowrank_optim.pretrain.build import build

    world = int(os.environ.get("WORLD_SIZE", "1"))
    with user_errors(ImportError):
        run, config, model, optimizer = build(options, "meta", processes=world)
    print(report.banner(run, config, model, world=world, device="meta (dry run)"))
    print("\n" + report.method_table(optimizer, model) + "\n")
    print(report.memory_table({run.optimizer: estimate(options).by_category, "AdamW": adamw_bytes(options)}))
    print("Predicted to the byte; activations are not included.")
    return 0


def train(options: Options) -> int:
    """The run itself."""
    started = time.perf_counter()
    from lowrank_optim.pretrain import report
    from lowrank_optim.pretrain.generate import sample
    from lowrank_optim.pretrain.launch import own, run_folder
    from lowrank_optim.pretrain.trainer import Trainer

    folder = run_folder(options)
    with own(folder):
        trainer = Trainer(options, folder)
        status = trainer.train()
    if status == 0 and trainer.leads and trainer.sizes:
        run = trainer.run
        sizes = {f"{run.optimizer}, measured": trainer.sizes, "AdamW, same model": adamw_bytes(options)}
        trainer.say("\n" + report.memory_table(sizes))
        seconds = time.perf_counter() - started
        trainer.say("\n" + report.summary(trainer.progress, trainer.evaluated, trainer.folder, seconds=seconds))
        if run.sample_tokens:
            prompt = run.sample_prompt or ("def " if run.dataset == "stdlib" else "The ")
            text = sample(trainer.model, trainer.text.tokenizer, prompt, tokens=run.sample_tokens, seed=run.seed)
            trainer.say("\nsample:\n" + text)
    return status


def adamw_bytes(options: Options) -> Mapping[str, int]:
    """What AdamW keeps, predicted: in this run if it is its optimizer, else for the same model with dense weights."""
    from lowrank_optim.memory.estimate import estimate

    if options.optimizer != "AdamW":
        dense: dict[str, Any] = {"parameterization": None, "parameterization_args": [], "weights": None}
        options = replace(options, optimizer="AdamW", optimizer_args=[], per_layer=False, **dense)
    return estimate(options).by_category


if __name__ == "__main__":
    sys.exit(main())
