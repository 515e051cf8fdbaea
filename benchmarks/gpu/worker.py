"""One process of a piece: measures its share of the figures, one after the other."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import record
from benchmarks.gpu.record import OutOfTimeError, Task
from benchmarks.gpu.setting import Setting, start_device

# The status of a process whose CUDA context is broken, and of one whose time was over.
BROKEN, UNFINISHED = 3, 4
# After one of these nothing that this process computes can be believed.
FATAL = (
    "CUDA error",
    "illegal memory access",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("piece")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--ends", type=float, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    end_with(options.parent)
    device, name = start_device()
    setting = Setting(options.out, options.scratch, options.ends, options.tokens, options.updates, device, name)
    tasks = importlib.import_module(f"benchmarks.gpu.{options.piece}").tasks(setting)
    sys.exit(work(setting, options.piece, tasks[options.share :: options.shares], options.share))


def end_with(parent: int) -> None:
    """End this process and its children when the runner is gone, however it ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def work(setting: Setting, piece: str, tasks: Sequence[Task], share: int = 0) -> int:
    """Measure what has not been measured; the status with which the process should end."""
    done = record.settled(setting.out, piece)
    mark = setting.scratch / f"running-{share}"
    for task in tasks:
        if task.name in done:
            continue
        if setting.left() <= 0:
            return UNFINISHED
        torch.manual_seed(0)
        # Tells the runner what was measured when this process died.
        mark.write_text(task.name)
        status = attempt(setting, piece, task)
        mark.unlink()
        if status:
            return status
    return 0


def attempt(setting: Setting, piece: str, task: Task) -> int:
    """Measure one figure and record it, or why there is none; not 0 where the process should end."""
    start = time.perf_counter()
    try:
        figures = dict(task.run())
        # What a kernel did wrong may show only now.
        setting.synchronize()
    except OutOfTimeError as error:
        record.write(setting.out, piece, task.name, setting.device_name, reason=str(error), again=True)
        return UNFINISHED
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        broken = setting.cuda and _is_broken(reason)
        figures = {"reason": reason}
    else:
        broken = False
    record.write(setting.out, piece, task.name, setting.device_name, **figures, took=time.perf_counter() - start)
    gc.collect()
    if setting.cuda and not broken:
        torch.cuda.empty_cache()
    return BROKEN if broken else 0


def _is_broken(reason: str) -> bool:
    if any(words in reason for words in FATAL) and "out of memory" not in reason:
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    main()
