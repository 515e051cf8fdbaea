from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lowrank_optim.pretrain.watch import Watch


def test_no_thread_outlives_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is inside the store when the interpreter ends aborts the process."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    watches = [Watch(rank, 2, 20.0) for rank in range(2)]
    everybody = threading.Barrier(2)

    def alive(rank: int) -> bool:
        return any(thread.name == f"watch of process {rank}" for thread in threading.enumerate())

    def run(watch: Watch) -> tuple[bool, bool]:
        with watch.watching():
            within = alive(watch.rank)
            everybody.wait(20)
        return within, alive(watch.rank)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, watches)) == [(True, False)] * 2
