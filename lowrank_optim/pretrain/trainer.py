"""A training run: build or resume, then updates with their evaluations, checkpoints and log."""

from __future__ import annotations

import math
import signal
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.pretrain import checkpoint, report
from lowrank_optim.pretrain.build import build, restarts_for
from lowrank_optim.pretrain.command_line import write_options
from lowrank_optim.pretrain.config import Options, UserError, user_errors
from lowrank_optim.pretrain.data import load_data, read_ahead
from lowrank_optim.pretrain.energy import captured_energy
from lowrank_optim.pretrain.launch import catch_signals, run_folder, start_accelerator
from lowrank_optim.pretrain.metrics import Metrics
from lowrank_optim.pretrain.sizes import kept_bytes
from lowrank_optim.pretrain.steps import evaluate
from lowrank_optim.pretrain.update import Updater

NON_FINITE_LIMIT = 10


class Trainer:
    """The run of ``options``; :meth:`train` makes it.

    Attributes:
        run, config, model: what is trained, with the published values of what is not given.
        progress, evaluated: where it stands, and its last validation loss.
        sizes: the most bytes of weights, gradients and optimizer state, after a step; None before.

    Raises:
        UserError: what the user can correct; nothing is written before.
    """

    def __init__(self, options: Options) -> None:
        self.folder = run_folder(options)
        found = checkpoint.find(options.resume, self.folder)
        self.accelerator = start_accelerator(options, self.folder)
        self.leads, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        with user_errors(ImportError):
            self.run, self.config, self.model, self.optimizer = build(options, self.device, processes=self.world)
            restarts = restarts_for(self.run, self.model, self.optimizer)
            self.update = Updater(self.run, self.model, self.optimizer, restarts=restarts, processes=self.accelerator)
        device = report.device_name(self.device)
        self.say(report.banner(self.run, self.config, self.model, world=self.world, device=device))
        self.progress, self.position, fingerprint = checkpoint.Progress(), None, None
        if found:
            self.progress, fingerprint = checkpoint.read_state(found, self.run, processes=self.world)
        with self.accelerator.main_process_first():
            self.text = load_data(self.run, vocab_size=self.config.vocab_size, rank=self.rank, world=self.world)
        self.say(f"data       {self.text.description}\nfolder     {self.folder}")
        if found:
            self._resume(found, fingerprint)
        self.sizes: dict[str, int] | None = None
        self.energy: dict[str, float] = {}
        self.evaluated, self.skipped = math.nan, 0

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.leads:
            report.write(text)

    def train(self) -> int:
        """Every update that is left; 0 at the end, 128 + signal where a signal stopped the run."""
        if self.progress.step >= self.run.max_steps:
            self.say(f"done       all {self.run.max_steps} updates had been made")
            return 0
        if self.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_options(self.run, self.folder / "config.yaml")
            except OSError as error:
                raise UserError(f"Invalid --output-dir: cannot write {self.folder} ({error.strerror})") from error
        self.metrics = Metrics(self.folder if self.leads else None, self.progress.step)
        # The optimizer and the schedule are not prepared: the wrapped schedule would step once a process.
        network = self.accelerator.prepare_model(self.update.network)
        self.update.network = torch.compile(network) if self.run.compile else network
        self.model.train()
        if self.progress.step == 0:
            self.progress.untrained_loss = self._validate()
        meter = report.Meter(self.run, self.config, self.model, start=self.progress.step, device=self.device)
        with (
            closing(read_ahead(self.text.train(self.position), depth=2 * self.run.accumulate)) as stream,
            report.progress_bar(self.run, self.progress.step, show=self.leads) as bar,
            catch_signals() as stop,
        ):
            while self.progress.step < self.run.max_steps:
                if self._advance(stream, meter, bar, stop):
                    self.say(f"stopped by a signal; --output-dir {self.folder} --resume auto continues")
                    return 128 + max(stop, default=signal.SIGTERM)
                meter.skip()
        self.metrics.close()
        self.accelerator.end_training()
        return 0

    def _resume(self, found: Path, fingerprint: str | None) -> None:
        if fingerprint != self.text.fingerprint:
            raise UserError(f"Cannot resume {found}: the data or the tokenizer is not what it was saved with")
        self.position = checkpoint.load_(found, self.update, rank=self.rank)
        self.say(f"resumed    {found} after {self.progress.step} updates")

    def _advance(self, stream: Any, meter: report.Meter, bar: Any, stop: list[int]) -> bool:
        """One update with what is due after it; whether the run stops before its end."""
        run, progress = self.run, self.progress
        # All micro-batches of an update first: its loss is a mean over all of their tokens.
        update = list(islice(stream, run.accumulate))
        batches = [batch for batch, _ in update]
        self.position = update[-1][1]
        counts = torch.tensor([sum(batch.targets for batch in batches), len(stop)])
        tokens, stopping = self._total(counts).tolist()
        made = self.update(batches, tokens, stepped=self._measure)
        if made.made:
            self.skipped = 0
        else:
            self.energy = {}
            self._leave_out(made.loss, made.grad_norm)
        progress.step += 1
        for restart in self.update.restarts:
            restart.after_step(progress.step)
        progress.tokens += tokens
        row = {"loss": made.loss, "lr": made.lr, "grad_norm": made.grad_norm}
        row["tokens_per_second"] = meter.update(progress.step, tokens)
        row["memory_bytes"], row["peak_memory_bytes"] = report.memory_in_use(self.device)
        row["refresh_seconds"] = getattr(self.optimizer, "refresh_seconds", 0.0)
        self._log({**row, **self.energy})
        bar.set_postfix_str(f"loss {made.loss:.3f}", refresh=False)
        bar.update()
        ends = progress.step == run.max_steps
        if progress.step % run.log_every == 0 or progress.step == 1 or ends:
            refresh_seconds = getattr(self.optimizer, "refresh_seconds", 0.0)
            self.say(meter.line(made.loss, made.lr, made.grad_norm, refresh_seconds))
        if ends or (run.eval_every and progress.step % run.eval_every == 0):
            self.evaluated = self._validate()
        if ends or stopping or (run.save_every and progress.step % run.save_every == 0):
            self._save()
        return bool(stopping) and not ends

    def _leave_out(self, loss: float, norm: float) -> None:
        self.skipped += 1
        where = " where gradients were not finite" if self.run.per_layer else ""
        self.say(f"warning: update {self.progress.step + 1} left out{where}: loss {loss}, gradient norm {norm}")
        if self.skipped == NON_FINITE_LIMIT:
            raise UserError(f"{self.skipped} updates in a row without a finite loss and gradient: lower --lr")

    def _measure(self) -> None:
        # At most 50 times in a run: each time costs a projection of every gradient.
        due = self.progress.step % max(1, self.run.max_steps // 50) == 0
        self.energy = captured_energy(self.optimizer) if due and not self.run.per_layer else {}
        self._measure_sizes()

    def _measure_sizes(self) -> None:
        """Take the largest sizes: at the first update, and where a line is logged, as refreshes add to them."""
        if self.sizes and (self.progress.step + 1) % self.run.log_every:
            return
        now = kept_bytes(self.model, self.optimizer)
        if self.update.gradient_bytes:
            now["gradients"] = self.update.gradient_bytes.most
        self.sizes = {key: max(size, (self.sizes or now)[key]) for key, size in now.items()}

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return summed

    def _log(self, row: dict[str, float]) -> None:
        self.metrics.write(step=self.progress.step, **row)
        self.accelerator.log(row, step=self.progress.step)

    def _validate(self) -> float:
        result = evaluate(
            self.model,
            self.text.validation(),
            limit=-(-self.run.eval_batches // self.world),
            legacy=self.run.legacy_eval,
            device=self.device,
            chunked=self.run.chunked_loss,
            reduce=self._total,
        )
        if not result.tokens:
            raise UserError(f"Invalid dataset: {self.run.dataset} has no validation text")
        self._log({"eval_loss": result.loss, "perplexity": result.perplexity})
        step = self.progress.step
        name = "untrained" if step == 0 else f"step {step}"
        found = f"validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f}, {result.tokens:,} tokens)"
        self.say(f"{name}: {found}")
        return result.loss

    def _save(self) -> None:
        from accelerate.utils import gather_object

        processes = gather_object([{"data": self.position, "random": checkpoint.random_state()}])
        self.metrics.sync()
        if self.leads:
            path = checkpoint.save(
                self.folder,
                self.progress,
                self.update,
                tokenizer=self.text.tokenizer,
                processes=processes,
                fingerprint=self.text.fingerprint,
            )
            self.say(f"saved      {path}")
        self.accelerator.wait_for_everyone()
