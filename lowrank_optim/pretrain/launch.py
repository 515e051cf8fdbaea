"""What surrounds a run: its folder, its processes, its signals."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_optim.pretrain.config import Options, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


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

    Raises:
        UserError: a package is missing, or a strategy is asked for that shards parameters.
    """
    tracker = None if options.report_to == "none" else options.report_to
    for package in ("accelerate", "transformers", "tqdm", *((tracker,) if tracker else ())):
        if importlib.util.find_spec(package) is None:
            extra = package if package == tracker else "'lowrank-optim[train]'"
            raise UserError(f"{package} is not installed: pip install {extra}")
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType
    from transformers.utils import logging

    # Its bars for writing one file would break up ours.
    logging.disable_progress_bar()
    if tracker == "wandb":
        # No account, no login, no question: `wandb sync` uploads the run later.
        os.environ.setdefault("WANDB_MODE", "offline")
    # Pure bf16 or fp32 as --dtype says, whatever the machine's Accelerate configuration.
    # Buffers are constants, the indices of sparse layers among them: nothing to send before every forward pass.
    # Gradients are views of what is sent, not copies beside it: half the memory.
    wrapper = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no", log_with=tracker, project_dir=str(folder), kwargs_handlers=[wrapper]
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{accelerator.distributed_type} shards parameters; this script runs one copy a process")
    if options.per_layer and accelerator.num_processes > 1:
        raise UserError(
            f"Invalid per_layer: True in {accelerator.num_processes} processes, where an update would come before the "
            "mean of their gradients; leave --per-layer out or start one process"
        )
    if tracker:
        scalars = {k: v for k, v in vars(options).items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers("lowrank-optim", config=scalars)
    return accelerator


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and the first SIGINT append to, so that the update in progress ends and is saved."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        # A second Ctrl-C ends the process as usual.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
