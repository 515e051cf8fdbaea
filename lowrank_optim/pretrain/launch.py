"""What surrounds a run: its folder, its processes, its signals."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_optim.ops import is_gpu
from lowrank_optim.pretrain.cache import TEMPORARY
from lowrank_optim.pretrain.config import Options, UserError, user_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"
# What schedulers send before they end a job, and people; Windows has the first two.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if name in dir(signal)]
# What file systems without locks say.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# EX_TEMPFAIL: try again.
OUT_OF_TIME = 75


def run_folder(options: Options) -> Path:
    """``--output-dir``, or the folder of the checkpoint to resume, or a new one below ``runs``."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        return path.parent if path.name.startswith("checkpoint-") else path
    method = "-".join(filter(None, (options.parameterization, options.optimizer)))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(options.model).stem}-{method}"
    return Path("runs") / name


def start_accelerator(options: Options, folder: Path) -> Accelerator:
    """Accelerate over the processes that ``accelerate launch`` or torchrun started, or over this one alone.

    Where its configuration asks for FSDP2 ``options.fsdp`` is set.

    Raises:
        UserError: the tracker is not installed, a strategy is asked for that shards parameters, or Accelerate sees
            another number of processes than was started.
    """
    tracker = None if options.report_to == "none" else options.report_to
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"{tracker} is not installed: pip install {tracker}")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from transformers.utils import logging

    # Its bars for writing one file would break up ours.
    logging.disable_progress_bar()
    if tracker == "wandb":
        # No account, no login, no question: `wandb sync` uploads the run later.
        os.environ.setdefault("WANDB_MODE", "offline")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2":
        # Its own FSDP2 splits all parameters along the first axis, which low-rank methods may compress.
        options.fsdp = True
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    started = int(os.environ.get("WORLD_SIZE", "0"))
    # Accelerate lets several processes train together on a CPU only where it is told to.
    cpu = started > 1 and not torch.accelerator.is_available()
    # Pure bf16 or fp32 as --dtype says, whatever the machine's Accelerate configuration.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", log_with=tracker, project_dir=str(folder))
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Invalid strategy of Accelerate: {accelerator.distributed_type.value}, expected one copy a process, or "
            "fsdp_version: 2 or --fsdp, which shard"
        )
    if started and accelerator.num_processes != started:
        raise UserError(
            f"Invalid number of processes: {started} were started and Accelerate sees {accelerator.num_processes}; "
            f"start them with torchrun --nproc_per_node {started}"
        )
    if options.graph_step and not is_gpu(accelerator.device):
        raise UserError(f"Invalid graph_step: True on {accelerator.device}, expected a CUDA device")
    if tracker:
        scalars = {k: v for k, v in vars(options).items() if isinstance(v, (int, float, str))}
        try:
            accelerator.init_trackers("lowrank-optim", config=scalars)
        # Each has exceptions of its own.
        except Exception as error:
            raise UserError(f"Cannot report to {tracker}: {' '.join(str(error).split())}") from error
    return accelerator


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Make a run folder if need be, keep other runs out of it, and clear what killed writes left there.

    The lock is one of the operating system: it ends with the process, however that ends. Of several processes that
    train together the first holds it.

    Raises:
        UserError: another run holds it, or the folder cannot be written.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    from filelock import FileLock, Timeout

    made = not folder.exists()
    file = folder / LOCK
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Invalid output_dir: another run is writing {folder}") from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"Invalid output_dir: cannot write {folder} ({error.strerror or error})") from error
        print(f"warning: nothing keeps a second run out of {folder} ({error})", file=sys.stderr)
    try:
        if lock.is_locked:
            with user_errors(OSError):
                for path in folder.glob(f"{TEMPORARY}checkpoint-*"):
                    shutil.rmtree(path)
        yield
    finally:
        # Before the release, after which it may be another's.
        with suppress(OSError):
            file.unlink(missing_ok=True)
            if made:
                # Where nothing came of the run.
                folder.rmdir()
        lock.release()


# Asked for, and no error.
class Stopped(Exception):  # noqa: N818
    """The run is to end before its time with all that is done saved, then with ``error`` or ``status``."""

    def __init__(self, reason: str, status: int, error: Exception | None = None) -> None:
        super().__init__(reason)
        self.status, self.error = status, error


class Stop:
    """Whether a run is to stop: because of a signal, or because its time is nearly up.

    Args:
        started: when the run began, of ``time.monotonic``.
        minutes: how long it may take, None without a limit.
    """

    def __init__(self, started: float, minutes: float | None) -> None:
        self.deadline = None if minutes is None else started + 60 * minutes
        self.signals: list[int] = []
        # Seconds that the last save took, and that one look at the clock may come after the other.
        self.save_seconds = self.pause = 0.0
        self.looked: float | None = None
        self.interrupts = False

    def is_due(self) -> bool:
        """Whether to stop now; to be asked once a micro-batch."""
        now = time.monotonic()
        if self.looked is not None:
            # An hour after a slow first update its length says nothing any more.
            self.pause = max(0.9 * self.pause, now - self.looked)
        self.looked = now
        return bool(self.signals) or self.is_late(now)

    def is_late(self, now: float) -> bool:
        """Whether a save that begins at the next look, and takes half longer than any before, would come too late."""
        return self.deadline is not None and now + self.pause + 1.5 * self.save_seconds > self.deadline

    def expect(self, size: int) -> None:
        """Before the first save: how long one of ``size`` bytes may take, at 100 MB/s."""
        self.save_seconds = self.save_seconds or size / 100e6

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which no time limit interrupts."""
        began = time.monotonic()
        yield
        self.looked = time.monotonic()
        self.save_seconds = self.looked - began

    def cause(self, error: Exception | None = None) -> Stopped:
        """Why to stop, once it is known that it is so, here or on another process."""
        if error:
            return Stopped(str(error), 2, error)
        if self.signals:
            return Stopped(signal.Signals(self.signals[0]).name, 128 + self.signals[0])
        if self.deadline is not None:
            return Stopped("--max-time", OUT_OF_TIME)
        return Stopped("another process", 128 + signal.SIGTERM)

    @contextmanager
    def interrupting(self, possible: bool) -> Iterator[None]:
        """Within it a signal raises :class:`Stopped` at once, where that is possible."""
        self.interrupts = possible
        try:
            yield
        finally:
            self.interrupts = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signals of :data:`SIGNALS` are noted, so that the run can save; a second SIGINT interrupts."""

        def note(number: int, frame: Any) -> None:
            self.signals.append(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.interrupts:
                self.interrupts = False
                raise self.cause()

        # nohup has SIGHUP ignored, and so it stays.
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
