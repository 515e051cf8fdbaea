"""``train_llama.py`` hundreds of times: a process that has imported everything forks one child a run.

A child counts what happens to the files of its run folder (opened for writing, renamed, made, removed) and can be given
a fault at any of these moments: a signal, an error of the operating system, or the loss of the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Run(NamedTuple):
    """What became of a run.

    status: of its exit; -N where signal N ended it.
    events: the number of things that happened to the files of its folder.
    """

    status: int
    out: str
    err: str
    events: int


class Server:
    """Makes runs, one after the other."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, line: list[str], folder: Path, **fault: Any) -> Run:
        """``train_llama.py LINE --output-dir FOLDER``.

        Args:
            fault: ``at``, the number of the event that it comes with, and what comes: ``signals`` (numbers that the
                process sends itself, ``after`` so many seconds), ``errno`` (of all events from then on) or ``remove``
                (the folder; "replace": puts another in its place). Without ``at``: ``largest`` (bytes that a file can
                have), or ``spoil`` (first and last update whose loss is multiplied, and the factor).
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([[*line, "--output-dir", str(folder)], str(folder), fault]) + "\n")
        self.process.stdin.flush()
        return Run(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import torch

    import train_llama
    from lowrank_optim.cli import train

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    # A table that a run prints at its end, and that takes a fifth of the time of such a short one.
    train.adamw_sizes = lambda *_: []
    warm()
    for request in sys.stdin:
        line, folder, fault = json.loads(request)
        # Pipes, because a limit on the size of files is to spare what a run says; it is less than they hold.
        pipes = [os.pipe() for _ in range(3)]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number, (_, end) in enumerate(pipes[:2], 1):
                    os.dup2(end, number)
                watch(folder, fault, pipes[2][1])
                status = train_llama.main(line)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        for _, end in pipes:
            os.close(end)
        _, status = os.waitpid(child, 0)
        out, err, events = (os.fdopen(end, "rb").read() for end, _ in pipes)
        answers.write(json.dumps([os.waitstatus_to_exitcode(status), out.decode(), err.decode(), len(events)]) + "\n")
        answers.flush()


def warm() -> None:
    """Do what a process does once, imports and caches, here and not in every child; nothing that starts threads."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    import train_llama
    from lowrank_optim.pretrain.trainer import Trainer

    assert PreTrainedTokenizerFast and Trainer
    logging.disable_progress_bar()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(None):
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(place)
        train_llama.main(["--model", place, "--dry-run"])


def watch(folder: str, fault: dict[str, Any], count: int) -> None:
    """Count the events of this process from now on, one byte each into ``count``, and let the fault come."""
    made = 0
    busy = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal made, busy
        if busy or event not in EVENTS or not str(args[0]).startswith(folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        busy = True
        os.write(count, b".")
        made += 1
        try:
            strike(folder, fault, made)
        finally:
            busy = False

    if "largest" in fault:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest"], resource.RLIM_INFINITY))
    if "spoil" in fault:
        spoil(*fault["spoil"])
    sys.addaudithook(hook)


def strike(folder: str, fault: dict[str, Any], made: int) -> None:
    at = fault.get("at", 0)
    if made >= at and "errno" in fault:
        raise OSError(fault["errno"], os.strerror(fault["errno"]), folder)
    if made != at:
        return
    if "signals" in fault:
        timer = threading.Timer(fault.get("after", 0.0), send, (fault["signals"],))
        timer.daemon = True
        timer.start()
        if not fault.get("after"):
            # Before whatever the event announces.
            timer.join()
    if "remove" in fault:
        shutil.rmtree(folder)
        if fault["remove"] == "replace":
            os.mkdir(folder)


def send(signals: list[int]) -> None:
    for number in signals:
        os.kill(os.getpid(), number)
        # The first must have been handled before the second comes.
        time.sleep(0.01)


def spoil(first: int, last: int, factor: float) -> None:
    """Multiply the losses of the updates ``first`` to ``last`` of this process by a factor."""
    from lowrank_optim.pretrain import update

    whole = update.Updater._accumulate
    number = 0

    def spoilt(self: Any, *args: Any) -> float:
        nonlocal number
        number += 1
        return whole(self, *args) * (factor if first <= number <= last else 1.0)

    update.Updater._accumulate = spoilt  # type: ignore[method-assign]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
