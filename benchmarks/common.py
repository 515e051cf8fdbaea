"""What every benchmark shares: where it ran, how it times, what it writes."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "numpy", "triton", "transformers", "bitsandbytes", "galore-torch", "apollo-torch", "fira",
)  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, memory, accelerator."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, of the packages of the comparison, and of this checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    if described.returncode == 0:
        found["checkout"] = described.stdout.strip()
    return found


def write_result(name: str, device: torch.device, figures: Mapping[str, Any]) -> Path:
    """Write ``results/name.json`` with the figures and everything needed to repeat them; returns its path."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name.removesuffix('.__main__')}" if module is not None else Path(sys.argv[0]).name
    result = {
        "name": name,
        "command": f"python {program} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(device),
        "versions": versions(),
        **figures,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def read_result(name: str) -> dict[str, Any] | None:
    """What :func:`write_result` wrote, None where it has not been measured."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def interleave(
    contestants: Mapping[str, Callable[[], None]],
    device: torch.device,
    *,
    budget: float,
    least: int,
    most: int = 100,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, A B C A B C ..., so that a busy moment hits all of them alike.

    Args:
        budget: seconds after which no further round starts.
        least: rounds even then.
        most: rounds at most.
        warmup: rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for turn in range(-warmup, most):
            if turn >= least and time.perf_counter() - start > budget:
                break
            for name, run in contestants.items():
                taken = timed(run, device)
                if turn >= 0:
                    seconds[name].append(taken)
    finally:
        gc.enable()
    return seconds


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Wall seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "n": len(ordered),
    }


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within the rounds: what slows both at once cancels. ``base`` may have more rounds."""
    return statistics.median(a / b for a, b in zip(values, base))


def held_bytes(state: Any, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of all tensors that an optimizer's state keeps alive, also inside of other packages' projector objects.

    A storage counts once and whole: a view counts for everything that it keeps alive.
    """
    seen: set[int] = set()
    storages = {tensor.untyped_storage()._cdata for tensor in exclude}
    total = 0
    stack = [state]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage._cdata not in storages:
                storages.add(storage._cdata)
                total += storage.nbytes()
            continue
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, type(None))):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not callable(item):
            stack.extend(vars(item).values())
    return total


class NewTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors of at least ``least`` elements that operations create, whatever their type.

    It sees what an operation returns, not the scratch space of a library inside of it.
    """

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least = least
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.count += tensor.numel() >= self.least
        return result
