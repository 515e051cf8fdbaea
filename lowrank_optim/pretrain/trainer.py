"""A training run: build or resume, then updates with their evaluations, checkpoints and log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.pretrain import checkpoint, report
from lowrank_optim.pretrain.build import build, build_parallel, restarts_for
from lowrank_optim.pretrain.command_line import write_options
from lowrank_optim.pretrain.config import Options, UserError, user_errors
from lowrank_optim.pretrain.data import load_data, read_ahead
from lowrank_optim.pretrain.divergence import PATIENCE
from lowrank_optim.pretrain.energy import captured_energy
from lowrank_optim.pretrain.launch import OUT_OF_TIME, Stop, Stopped, start_accelerator
from lowrank_optim.pretrain.metrics import Metrics
from lowrank_optim.pretrain.parallel import replicate
from lowrank_optim.pretrain.random_state import random_state, seed_of, set_random_state
from lowrank_optim.pretrain.sharded_checkpoint import Gathered, gather
from lowrank_optim.pretrain.sizes import kept_bytes
from lowrank_optim.pretrain.sources import Saved
from lowrank_optim.pretrain.steps import evaluate, in_step, share_of
from lowrank_optim.pretrain.update import Updater
from lowrank_optim.pretrain.watch import Watch

# Larger files of a checkpoint are compared with their digests beside the load.
READ_BEFORE = 2**24


class Trainer:
    """The run of ``options`` in ``folder``, which it must own; :meth:`train` makes it.

    Attributes:
        run, config, model: what is trained, with the published values of what is not given.
        progress, evaluated: where it stands, and its last validation loss.
        sizes: the most bytes of weights, gradients and optimizer state, after a step; None before.

    Raises:
        UserError: what the user can correct; nothing is written before.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.folder, self.stop = folder, Stop(time.monotonic(), options.max_time)
        candidates = checkpoint.find(options.resume, folder)
        self.accelerator = start_accelerator(options, self.folder)
        self.leads, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        # What is wrong with the options is said before the data is read, what is wrong with that before the model takes
        # memory.
        with user_errors(ImportError):
            run, config, self.skeleton, _ = build(options, "meta", processes=self.world)
        found = self._choose(candidates, digests=run.verify, most=READ_BEFORE)
        if found:
            run.accumulate = checkpoint.accumulation(found, run, processes=self.world)
            options = replace(options, batch_size=run.batch_size, accumulate=run.accumulate)
        self.progress = checkpoint.read_state(found, run, processes=self.world) if found else checkpoint.Progress()
        saved = Saved(checkpoint.read_fingerprint(found), found) if found else None
        with self.accelerator.main_process_first():
            self.text = load_data(run, vocab_size=config.vocab_size, rank=self.rank, world=self.world, saved=saved)
        with user_errors(ImportError):
            self.run, self.config, self.model, network, self.optimizer = build_parallel(
                options, self.device, processes=self.world
            )
            # What fully_shard adds to a module has no type.
            self.network: Any = network
            self.update = Updater(
                self.run, self.model, self.optimizer, network=self.network,
                restarts=restarts_for(self.run, self.model, self.optimizer), processes=self.accelerator,
            )  # fmt: skip
        self.sharded = self.run.fsdp and self.world > 1
        self.watch = Watch(self.rank, self.world, self.run.process_timeout)
        if self.rank:
            # The first process goes on with the numbers that one alone would draw.
            torch.manual_seed(seed_of(self.run.seed, self.rank))
        device = report.device_name(self.device)
        self.say(report.banner(self.run, self.config, self.model, world=self.world, device=device))
        self.say(f"data       {self.text.description}\nfolder     {self.folder}")
        self.position = None
        if found:
            found = self._load(candidates[candidates.index(found) :])
            self.say(f"resumed    {found} after {self.progress.step} updates")
        # The update whose checkpoint this folder has already.
        self.start = self.progress.step
        self.saved = self.start if found and found.parent == folder else None
        self.sizes: dict[str, int] | None = None
        self.energy: dict[str, float] = {}
        self.evaluated, self.postponed, self.reports = math.nan, False, True

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.leads:
            report.write(text)

    def train(self) -> int:
        """Every update that is left.

        Returns:
            0 at the end, 128 + signal where a signal stopped the run, 75 where its time was up.
        """
        with self.stop.listening(), self.watch.watching():
            try:
                return self._train()
            except Stopped as stopped:
                return self._end_early(stopped)

    def _train(self) -> int:
        self._open_folder()
        if self.progress.step == 0:
            self.progress.untrained_loss = self._validate()
        elif self._owes_evaluation():
            self.evaluated = self._validate()
        if self.progress.step >= self.run.max_steps:
            self.say(f"done       all {self.run.max_steps} updates had been made")
            return 0
        network: Any = self.network
        if self.world > 1 and not self.sharded and not self.run.per_layer:
            network = replicate(network, self.device)
        self.update.network = torch.compile(network) if self.run.compile else network
        self.model.train()
        meter = report.Meter(self.run, self.config, self.model, start=self.progress.step, device=self.device)
        with (
            closing(read_ahead(self.text.train(self.position), depth=2 * self.run.accumulate)) as stream,
            report.progress_bar(self.run, self.progress.step, show=self.leads) as bar,
        ):
            while self.progress.step < self.run.max_steps:
                self._advance(stream, meter, bar)
                meter.skip()
        self.metrics.close()
        self._report(self.accelerator.end_training)
        return 0

    def _load(self, candidates: list[Path]) -> Path:
        """Load the first checkpoint, or, where its large files turn out to be broken, the next whole one."""
        found, *rest = candidates
        wrong: checkpoint.BrokenCheckpointError | None = None
        try:
            self.position = checkpoint.load_(
                found, self.update, rank=self.rank, world=self.world, digests=self.leads and self.run.verify,
                any_=self._any,
            )  # fmt: skip
        except checkpoint.BrokenCheckpointError as error:
            wrong = error
        if not self._any(wrong is not None):
            return found
        wrong = wrong or checkpoint.BrokenCheckpointError(found, "another process cannot load it")
        following = self._choose(rest, digests=self.run.verify, most=READ_BEFORE)
        if following is None:
            raise wrong
        self.say(f"warning: passed over {found}: {wrong.reason}")
        self.progress = checkpoint.read_state(following, self.run, processes=self.world)
        return self._load(rest[rest.index(following) :])

    def _choose(self, candidates: list[Path], *, digests: bool, most: float = math.inf) -> Path | None:
        """The newest checkpoint that is whole as far as it is read, as the first process finds it."""
        from accelerate.utils import broadcast_object_list

        chosen: list[Path | None] = [None]
        if self.leads:
            chosen[0], wrong = checkpoint.newest_whole(candidates, digests=digests, most=most)
            for path, reason in wrong.items():
                self.say(f"warning: passed over {path}: {reason}")
        broadcast_object_list(chosen)
        return chosen[0]

    def _open_folder(self) -> None:
        step = self.progress.step
        if self.leads:
            with user_errors(OSError):
                self._set_aside("broken")
                self.folder_is = self.folder.stat()
                if step < self.run.max_steps:
                    write_options(self.run, self.folder / "config.yaml")
        self.metrics = Metrics(self.folder if self.leads else None, step, self.progress.rollbacks)

    def _set_aside(self, mark: str) -> None:
        for path in checkpoint.set_aside(self.folder, self.progress.step, mark):
            self.say(f"warning: set aside as {path}, to be deleted when it is of no use")

    def _advance(self, stream: Any, meter: report.Meter, bar: Any) -> None:
        """One update with what is due after it.

        Raises:
            Stopped: the run is to stop; this update is not made.
        """
        run, progress = self.run, self.progress
        update, tokens = self._next(stream)
        before = random_state()
        try:
            made = self.update([batch for batch, _ in update], tokens, stepped=self._measure, between=self._look)
        except Stopped:
            set_random_state(before)
            raise
        epoch = update[-1][1]["epoch"]
        if self.position is not None and epoch != self.position.get("epoch"):
            self.say(f"data       the text begins anew at update {progress.step + 1}, epoch {epoch + 1}")
        self.position = update[-1][1]
        if not made.made:
            self.energy = {}
            where = " where gradients were not finite" if run.per_layer else ""
            found = f"loss {made.loss}, gradient norm {made.grad_norm}"
            self.say(f"warning: update {progress.step + 1} left out{where}: {found}")
        diverged = progress.guard.sees(made.loss, made=made.made, factor=run.loss_limit)
        progress.step += 1
        for restart in self.update.restarts:
            restart.after_step(progress.step)
        progress.tokens += tokens
        row = {"loss": made.loss, "lr": made.lr, "grad_norm": made.grad_norm, "epoch": epoch}
        row["tokens_per_second"] = meter.update(progress.step, tokens)
        row["memory_bytes"], row["peak_memory_bytes"] = report.memory_in_use(self.device)
        row["refresh_seconds"] = getattr(self.optimizer, "refresh_seconds", 0.0)
        self._log({**row, **self.energy})
        with suppress(OSError):
            bar.set_postfix_str(f"loss {made.loss:.3f}", refresh=False)
            bar.update(progress.step - bar.n)
        ends = progress.step == run.max_steps
        if progress.step % run.log_every == 0 or progress.step == 1 or ends:
            refresh_seconds = getattr(self.optimizer, "refresh_seconds", 0.0)
            self.say(meter.line(made.loss, made.lr, made.grad_norm, refresh_seconds))
        if diverged:
            self._roll_back(made.loss)
            meter.rewind(self.progress.step)
            return
        if ends or self._evaluates(progress.step):
            self.evaluated = self._validate()
        self.postponed |= bool(run.save_every) and progress.step % run.save_every == 0
        # What the first updates of a divergence leave is no place to go back to.
        if ends or (self.postponed and not progress.guard.suspect):
            self._save()

    def _next(self, stream: Any) -> tuple[list[Any], int]:
        """The micro-batches of an update, and the number of their tokens on all processes.

        All of them first: the loss of an update is a mean over all of their tokens.

        Raises:
            Stopped: it is not to be made, here or on another process.
        """
        failed: Exception | None = None
        update: list[Any] = []
        try:
            # A stream may hang; where others take part in an update, they must agree before it is left.
            with self.stop.interrupting(self.world == 1):
                update = list(islice(stream, self.run.accumulate))
        except Stopped:
            raise
        # Whatever it is, the other processes must learn of it before they wait for this one.
        except Exception as error:
            failed = error
        ends = bool(failed) or self.stop.is_due()
        counts = torch.tensor([sum(batch.targets for batch, _ in update), int(ends)])
        tokens, ending = self._total(counts).tolist()
        if ending:
            raise self.stop.cause(failed)
        return update, tokens

    def _look(self) -> None:
        """Between two micro-batches."""
        due = self.stop.is_due()
        if self._any(due):
            raise self.stop.cause()

    def _any(self, here: bool) -> bool:
        """Whether something is so on any process."""
        return here if self.world == 1 else bool(self._total(torch.tensor(int(here))))

    def _end_early(self, stopped: Stopped) -> int:
        """Save, and say why and how to go on.

        Raises:
            UserError: the time limit leaves none for an update, so that no repetition would ever end.
        """
        step = self.progress.step
        if stopped.status == OUT_OF_TIME and step == self.start:
            raise UserError(f"Invalid --max-time: {self.run.max_time:g} minutes, over before the first update")
        if step and step != self.saved:
            self._save()
        if stopped.error:
            raise stopped.error
        how = f"--output-dir {self.folder} --resume auto continues" if step else "nothing had been trained"
        self.say(f"stopped by {stopped} after {step} updates; {how}")
        return stopped.status

    def _roll_back(self, loss: float) -> None:
        """Go back to the last good checkpoint, and on with the data after those of the divergence.

        Raises:
            UserError: that has happened before, or there is none.
        """
        at, rollbacks = self.progress.step, self.progress.rollbacks
        what = f"{PATIENCE} updates in a row whose loss exploded or was not finite (loss {loss:.4g} at update {at})"
        found = self._choose(checkpoint.last_good(self.folder) if self.leads else [], digests=self.run.verify)
        if found is None or rollbacks:
            kept = f" since a rollback; {found} is the last good checkpoint" if found else ""
            raise UserError(f"{what}{kept}: lower --lr")
        self.progress = checkpoint.read_state(found, self.run, processes=self.world)
        checkpoint.load_(found, self.update, rank=self.rank, world=self.world, any_=self._any)
        self.progress.rollbacks = self.metrics.rollbacks = rollbacks + 1
        self.saved = self.progress.step
        first = self.saved + 1
        self.say(f"warning: {what}: back to {found}; the data of updates {first} to {at} are left out from now on")
        self._log({"rolled_back_from": at})
        if self.leads:
            with user_errors(OSError):
                self._set_aside("diverged")

    def _measure(self) -> None:
        # At most 50 times in a run: each time costs a projection of every gradient.
        due = self.progress.step % max(1, self.run.max_steps // 50) == 0
        self.energy = captured_energy(self.optimizer) if due and not self.run.per_layer else {}
        # The largest sizes: at the first update, and where a line is logged, as refreshes add to them.
        if self.sizes and (self.progress.step + 1) % self.run.log_every:
            return
        now = kept_bytes(self.model, self.optimizer)
        if self.update.gradient_bytes:
            now["gradients"] = self.update.gradient_bytes.most
        if self.sizes is None:
            self.stop.expect(now["weights"] + now["optimizer"])
        self.sizes = {key: max(size, (self.sizes or now)[key]) for key, size in now.items()}

    def _total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return summed

    def _log(self, row: dict[str, float]) -> None:
        self.metrics.write(self.progress.step, **row)
        self._report(lambda: self.accelerator.log(row, step=self.progress.step))

    def _report(self, act: Callable[[], None]) -> None:
        """Have ``--report-to`` told something, until that fails."""
        if not self.reports:
            return
        try:
            act()
        # A service and its files fail in ways of their own, and no run is worth less for it.
        except Exception as error:
            self.reports = False
            self.say(f"warning: no more reports to {self.run.report_to}: {' '.join(str(error).split())}")

    def _evaluates(self, step: int) -> bool:
        return bool(self.run.eval_every) and step % self.run.eval_every == 0

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped before the evaluation after its last update had ended."""
        step = self.progress.step
        due = self._evaluates(step) or step == self.run.max_steps
        return self._any(self.leads and due and self.metrics.last_evaluation != step)

    def _validate(self) -> float:
        batches = self.text.validation()
        if self.run.eval_batches:
            batches = islice(batches, share_of(self.run.eval_batches, rank=self.rank, world=self.world))
        stopping = self.stop.is_due
        if self.sharded:
            batches = in_step(batches, self._total)
            stopping = lambda: self._any(self.stop.is_due())  # noqa: E731
        result = evaluate(
            self.network,
            batches,
            limit=0,
            legacy=self.run.legacy_eval,
            device=self.device,
            reduce=self._total,
            stopping=stopping,
        )
        if self.sharded:
            # What an evaluation leaves gathered is not what the next update or load changes.
            network: Any = self.network
            network.reshard()
        if result.stopped:
            raise self.stop.cause()
        if not result.tokens:
            raise UserError(f"Invalid dataset: {self.run.dataset} has no validation text")
        self._log({"eval_loss": result.loss, "perplexity": result.perplexity})
        step = self.progress.step
        name = "before training" if step == 0 else f"step {step}"
        found = f"validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f}, {result.tokens:,} tokens)"
        self.say(f"{name}: {found}")
        return result.loss

    def _save(self) -> None:
        from accelerate.utils import gather_object

        processes = gather_object([{"data": self.position, "random": random_state()}])
        is_there, gathered = self.folder.is_dir(), None
        with self.stop.saving(), self.watch.away():
            self.metrics.sync()
            if self.sharded:
                gathered = gather(self.folder, self.progress.step, self.update, self.skeleton, leads=self.leads)
            if self.leads:
                self._write(processes, gathered, is_there=is_there)
        self.saved, self.postponed = self.progress.step, False
        self.accelerator.wait_for_everyone()

    def _write(self, processes: list[dict[str, Any]], gathered: Gathered | None, *, is_there: bool) -> None:
        if is_there and not os.path.samestat(self.folder.stat(), self.folder_is):
            raise UserError(f"{self.folder} has been replaced during the run; nothing was written into the new one")
        path = checkpoint.save(
            self.folder,
            self.progress,
            self.update,
            tokenizer=self.text.tokenizer,
            processes=processes,
            fingerprint=self.text.fingerprint,
            gathered=gathered,
        )
        self.say(f"saved      {path}")
        if not is_there:
            raise UserError(f"{self.folder} was removed during the run; what is left of it is {path}")
