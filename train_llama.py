#!/usr/bin/env python3
"""Pretrain a LLaMA with a low-rank optimizer: options -> build -> loop -> evaluation -> report.

    python train_llama.py                                             # minutes on two CPU cores, offline
    accelerate launch train_llama.py --dataset c4 --model llama_60m --dtype bf16

A run folder holds config.yaml, metrics.jsonl and checkpoint-N folders, each of which
``LlamaForCausalLM.from_pretrained`` loads and ``--resume`` continues to the last bit.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from itertools import islice

# Before torch starts its threads: where other programs want the cores too, threads that wait by spinning make an
# update 3 times slower (measured on 2 cores); alone it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lowrank_optim.pretrain.config import (
    Options,
    UserError,
    parse_options,
    user_errors,
    write_options,
)

NON_FINITE_LIMIT = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 for what the user can correct, 128 + signal when told to stop."""
    try:
        options = parse_options(argv)
        return plan(options) if options.dry_run else train(options)
    except SystemExit as end:
        # --help
        return int(end.code or 0)
    except UserError as error:
        print(f"train_llama.py: error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"train_llama.py: error: {error}; saved checkpoints are intact", file=sys.stderr)
    return 2


def plan(options: Options) -> int:
    """``--dry-run``: what would be trained and how, without data, memory or files."""
    from lowrank_optim.pretrain import report
    from lowrank_optim.pretrain.build import build

    world = int(os.environ.get("WORLD_SIZE", "1"))
    run, config, model, optimizer = build(options, "meta", world)
    print(report.banner(run, config, model, world=world, device="meta (dry run)"))
    print("\n" + report.method_table(optimizer, model) + "\n")
    sizes = {run.optimizer: report.predicted_bytes(config, run, run.optimizer)}
    sizes["AdamW"] = report.predicted_bytes(config, run, "AdamW")
    print(report.memory_table(sizes))
    print("Predicted to the byte; activations are not included.")
    return 0


def train(options: Options) -> int:
    """The run itself."""
    import torch
    from accelerate.utils import gather_object

    from lowrank_optim.pretrain import checkpoint, report
    from lowrank_optim.pretrain.build import build, start_in_backward
    from lowrank_optim.pretrain.data import load_data, read_ahead
    from lowrank_optim.pretrain.generate import sample
    from lowrank_optim.pretrain.launch import catch_signals, run_folder, start_accelerator
    from lowrank_optim.pretrain.llama import checkpoint_activations_
    from lowrank_optim.pretrain.metrics import Metrics
    from lowrank_optim.pretrain.optimizers import parse_optimizer_args
    from lowrank_optim.pretrain.parameterizations import build_restarts
    from lowrank_optim.pretrain.schedule import build_schedule
    from lowrank_optim.pretrain.steps import LossSum, clip_gradients_, evaluate

    started = time.perf_counter()
    folder = run_folder(options)
    found = checkpoint.find(options.resume, folder)
    accelerator = start_accelerator(options, folder)
    leads, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    device = accelerator.device

    def say(text: str) -> None:
        if leads:
            report.write(text)

    run, config, model, optimizer = build(options, device, world)
    schedule = build_schedule(optimizer, warmup=run.warmup_steps, total=run.max_steps)
    with user_errors():
        pairs = parse_optimizer_args(run.restart_args, "restart")
        restarts = build_restarts(run.restarts, pairs, model, optimizer, first=run.warmup_steps, seed=run.seed)
        in_backward = start_in_backward(run, optimizer) if run.per_layer else None
    say(report.banner(run, config, model, world=world, device=report.device_name(device)))
    progress, position, fingerprint = checkpoint.Progress(), None, None
    if found:
        progress, fingerprint = checkpoint.read_state(found, run, processes=world)
    with accelerator.main_process_first():
        text = load_data(run, vocab_size=config.vocab_size, rank=rank, world=world)
    say(f"data       {text.description}\nfolder     {folder}")
    if found:
        if fingerprint != text.fingerprint:
            raise UserError(f"Cannot resume {found}: the data or the tokenizer is not what it was saved with")
        position = checkpoint.load_(
            found,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            restarts=restarts,
            in_backward=in_backward,
            rank=rank,
        )
        say(f"resumed    {found} after {progress.step} updates")
        if progress.step >= run.max_steps:
            say(f"done       all {run.max_steps} updates had been made")
            return 0
    if leads:
        with user_errors(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_options(run, folder / "config.yaml")
    metrics = Metrics(folder if leads else None, progress.step)

    if run.checkpointing:
        with user_errors():
            checkpoint_activations_(model, every=run.checkpoint_every)
    # The optimizer and the schedule are not prepared: the wrapped schedule would step once a process.
    network = accelerator.prepare_model(LossSum(model, chunked=run.chunked_loss))
    if run.compile:
        network = torch.compile(network)

    def around(*, last: bool) -> AbstractContextManager[object]:
        """What surrounds the backward pass of one micro-batch."""
        if in_backward:
            stack = ExitStack()
            for restart in restarts:
                stack.enter_context(restart.ramped())
            stack.enter_context(in_backward.micro_batch(last))
            return stack
        return nullcontext() if last else accelerator.no_sync(network)

    def total(values: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = accelerator.reduce(values.to(device), reduction="sum")
        return summed

    def validate() -> float:
        result = evaluate(
            model,
            text.validation(),
            limit=-(-run.eval_batches // world),
            legacy=run.legacy_eval,
            device=device,
            chunked=run.chunked_loss,
            reduce=total,
        )
        if not result.tokens:
            raise UserError(f"Invalid dataset: {run.dataset} has no validation text")
        metrics.write(step=progress.step, eval_loss=result.loss, perplexity=result.perplexity)
        accelerator.log({"eval_loss": result.loss, "perplexity": result.perplexity}, step=progress.step)
        name = "untrained" if progress.step == 0 else f"step {progress.step}"
        say(f"{name}: validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f}, {result.tokens:,} tokens)")
        return result.loss

    def save() -> None:
        processes = gather_object([{"data": position, "random": checkpoint.random_state()}])
        metrics.sync()
        if leads:
            path = checkpoint.save(
                folder,
                progress,
                model=model,
                tokenizer=text.tokenizer,
                optimizer=optimizer,
                schedule=schedule,
                restarts=restarts,
                in_backward=in_backward,
                processes=processes,
                options=run,
                fingerprint=text.fingerprint,
                keep=run.keep,
            )
            say(f"saved      {path}")
        accelerator.wait_for_everyone()

    model.train()
    if progress.step == 0:
        progress.untrained_loss = validate()
    meter = report.Meter(run, config, model, start=progress.step, device=device)
    sizes, skipped, evaluated = None, 0, math.nan
    with (
        closing(read_ahead(text.train(position), depth=2 * run.accumulate)) as stream,
        report.progress_bar(run, progress.step, show=leads) as bar,
        catch_signals() as stop,
    ):
        while progress.step < run.max_steps:
            # All micro-batches of an update first: its loss is a mean over all of their tokens.
            update = list(islice(stream, run.accumulate))
            position = update[-1][1]
            counts = torch.tensor([sum(batch.targets for batch, _ in update), len(stop)])
            tokens, stopping = total(counts).tolist()
            loss = torch.zeros((), device=device)
            for number, (batch, _) in enumerate(update, 1):
                with around(last=number == len(update)):
                    part = network(batch.to(device)) / tokens
                    # Gradients are averaged over the processes, the loss is a sum over them.
                    accelerator.backward(part * world)
                loss += part.detach()
            loss_value = total(loss).item()
            norms = in_backward.grad_norm if in_backward else clip_gradients_(model.parameters(), run.grad_clip)
            norm = norms.item()
            lr = float(optimizer.param_groups[0]["lr"]) * math.prod(restart.lr_factor for restart in restarts)
            if math.isfinite(loss_value) and math.isfinite(norm):
                # Updates that the backward pass has made are not made again.
                optimizer.step()
                skipped = 0
                sizes = sizes or report.measured_bytes(model, optimizer)
            else:
                skipped += 1
                where = " where gradients were not finite" if in_backward else ""
                say(f"warning: update {progress.step + 1} left out{where}: loss {loss_value}, gradient norm {norm}")
                if skipped == NON_FINITE_LIMIT:
                    raise UserError(f"{skipped} updates in a row without a finite loss and gradient: lower --lr")
            optimizer.zero_grad()
            schedule.step()

            progress.step += 1
            for restart in restarts:
                restart.after_step(progress.step)
            progress.tokens += tokens
            row = {"loss": loss_value, "lr": lr, "grad_norm": norm}
            row["tokens_per_second"] = meter.update(progress.step, tokens)
            metrics.write(step=progress.step, **row)
            accelerator.log(row, step=progress.step)
            bar.set_postfix_str(f"loss {loss_value:.3f}", refresh=False)
            bar.update()
            ends = progress.step == run.max_steps
            if progress.step % run.log_every == 0 or progress.step == 1 or ends:
                say(meter.line(loss_value, lr, norm, getattr(optimizer, "refresh_seconds", 0.0)))
            if ends or (run.eval_every and progress.step % run.eval_every == 0):
                evaluated = validate()
            if ends or stopping or (run.save_every and progress.step % run.save_every == 0):
                save()
            if stopping and not ends:
                say(f"stopped by a signal; --output-dir {folder} --resume auto continues")
                return 128 + max(stop, default=signal.SIGTERM)
            meter.skip()
    metrics.close()
    accelerator.end_training()
    if leads and sizes:
        adamw = report.predicted_bytes(config, run, "AdamW")
        say("\n" + report.memory_table({f"{run.optimizer}, measured": sizes, "AdamW, same model": adamw}))
        say("\n" + report.summary(progress, evaluated, folder, seconds=time.perf_counter() - started))
        if run.sample_tokens:
            prompt = run.sample_prompt or ("def " if run.dataset == "stdlib" else "The ")
            say("\nsample:\n" + sample(model, text.tokenizer, prompt, tokens=run.sample_tokens, seed=run.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
