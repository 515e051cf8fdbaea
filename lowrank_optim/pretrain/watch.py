"""Whether all processes of a run are alive: one that is killed or frozen must not leave the others waiting."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

# Seconds between two signs of life, at most.
PERIOD = 5.0
# What a process says that is not to be waited for.
AWAY = "away"


class Watch:
    """Ends this process when another one has been lost, with a line that names it.

    A thread of every process leaves a new number in the store of torchrun every few seconds, and reads those of the
    others. A process is lost when its number stays the same for ``timeout`` seconds, or, on this machine, when it is
    gone; a frozen one is killed, because torchrun would wait for it. What the main thread waits for does not matter. A
    process that stood still itself, as when the whole job is suspended, begins to count anew.

    Args:
        rank, world: of this process, and how many there are.
        timeout: in seconds; 0 watches nothing.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._here = f"{socket.gethostname()} {os.getppid()}"
        self._away, self._ends, self._look, self._lock = False, False, threading.Event(), threading.Lock()
        self._store: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it processes are watched; all of them enter it together."""
        if self.world == 1 or not self.timeout or "MASTER_ADDR" not in os.environ:
            yield
            return
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        # A connection of its own: one that waits would hold up the main thread's.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(self.timeout, 1)),
        )
        self._store = PrefixStore(f"lowrank {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._say(0)
        # Until everybody has left its first number; the first process may be reading a checkpoint.
        self._store.wait([str(rank) for rank in range(self.world)], timedelta(minutes=30))
        thread = threading.Thread(target=self._watch, name=f"watch of process {self.rank}", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError:
            # Of a communication, perhaps: a process that is gone is named before its traceback.
            for _ in range(20):
                self._look.set()
                thread.join(0.1)
            raise
        finally:
            self._ends = self._away = True
            self._look.set()
            with suppress(RuntimeError):
                self._say(0)
            # A thread inside the store must not outlive the interpreter, which would abort the process.
            thread.join(timeout=self.timeout)
        # Nobody ends, perhaps with the store, while another still watches.
        with suppress(RuntimeError):
            self._store.set(f"left {self.rank}", "")
            self._store.wait([f"left {rank}" for rank in range(self.world)], timedelta(seconds=self.timeout))

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within it the others wait for this process, however long it holds up its threads."""
        if self._store is None:
            yield
            return
        self._away = True
        self._say(0)
        try:
            yield
        finally:
            self._away = False
            self._look.set()

    def _say(self, number: int) -> None:
        with self._lock:
            self._store.set(str(self.rank), AWAY if self._away else f"{self._here} {os.getpid()} {number}")

    def _watch(self) -> None:
        period = min(PERIOD, self.timeout / 5)
        others = [rank for rank in range(self.world) if rank != self.rank]
        heard: dict[int, tuple[str, float]] = {}
        number, looked = 0, time.monotonic()
        while not self._ends:
            self._look.wait(period)
            self._look.clear()
            number += 1
            try:
                self._say(number)
                said = {rank: self._store.get(str(rank)).decode() for rank in others}
            except RuntimeError:
                # That of torchrun ends with it; any other is the first process'.
                if self._ends or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not self.rank:
                    return
                self._end(0, "", gone=True, first=self.rank == 1)
            now = time.monotonic()
            stood_still, looked = now - looked > self.timeout / 2, now
            for rank, words in said.items():
                if words == AWAY or stood_still or heard.get(rank, ("", 0.0))[0] != words:
                    heard[rank] = words, now
                gone = _gone(words, self._here)
                if words != AWAY and (gone or now - heard[rank][1] > self.timeout):
                    # The first to notice says it.
                    self._end(rank, words, gone=gone, first=self._store.add("said", 1) == 1)

    def _end(self, rank: int, words: str, *, gone: bool, first: bool) -> None:
        if first:
            what = "was killed or failed" if gone else f"has given no sign of life for {self.timeout:g} s"
            # A bar of progress may stand on the line.
            print(
                f"\nlowrank-train: error: process {rank} of {self.world} {what}; --resume auto continues from the last "
                "checkpoint, on fewer processes too",
                file=sys.stderr,
                flush=True,
            )
        if not gone and words.startswith(self._here):
            with suppress(ProcessLookupError):
                os.kill(int(words.split()[2]), signal.SIGKILL)
        os._exit(2)


def _gone(words: str, here: str) -> bool:
    """Whether what a process of the same launcher said came from one that is no more."""
    if os.name != "posix" or not words.startswith(f"{here} "):
        return False
    try:
        os.kill(int(words.split()[2]), 0)
    except ProcessLookupError:
        return True
    return False
