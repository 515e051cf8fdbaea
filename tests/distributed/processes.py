"""Functions run on several gloo processes of this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], world: int, *arguments: Any, start: str = "forkserver") -> list[Any]:
    """What ``function(rank, world, *arguments)`` returns on every process.

    Args:
        start: "forkserver" imports once for all processes; "fork" needs no import, but nothing may have gone backward
            in this process before.

    Raises:
        AssertionError: one of them failed, with its traceback.
    """
    multiprocessing.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (function, world, folder, arguments), nprocs=world, start_method=start)
        results = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
    for rank, (_, error) in enumerate(results):
        assert error is None, f"process {rank} of {world}:\n{error}"
    return [value for value, _ in results]


def _enter(rank: int, function: Callable[..., Any], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        result: Any = (function(rank, world, *arguments), None)
    except Exception:
        result = (None, traceback.format_exc())
    torch.save(result, Path(folder, f"{rank}.pt"))
    if result[1] is None:
        dist.destroy_process_group()
