"""Launches and bytes of an optimizer's step on a GPU, and what it costs the host, without a GPU.

    python -m benchmarks.launches

writes ``results/launches.json``, from which ``benchmarks.table`` draws the tables of docs/kernels.md. Launches:
the step runs on fake CUDA tensors; calls of ATen that are neither views nor allocations are counted, and Triton's
kernels are stubs that count. Bytes: of all tensors that a launch reads, or writes. The host: calls of functions and
microseconds of CPU time, a matrix and step between refreshes, on tiny tensors with kernels and graphs stubbed, as on a
GPU where the host looks at nothing; nothing of them is CUDA's own launch. Beside them, as what no step can do without,
the two products of GaLore.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_optim
from benchmarks.common import markdown, read_result, write_result
from lowrank_optim import nn as layers
from lowrank_optim import ops
from lowrank_optim.ops import blockwise
from lowrank_optim.optim import finite
from lowrank_optim.optim.replay import ReplayedStep
from lowrank_optim.optim.subspaces import fixed_basis

# Of what is neither a view nor an allocation, nor asks for a dtype or a profiler.
NO_KERNEL = (
    "prim::",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "detach",
    "promote_types",
    "profiler::",
)
# What Triton's kernels read and write; what else they get they read, or write.
IN_PLACE = (
    *("exp_avg_ptr", "exp_avg_sq_ptr", "exp_avg_scale_ptr", "exp_avg_sq_scale_ptr", "weight_ptr", "correction_ptr"),
    *("codes_ptr", "matrix_ptr"),
)
NEVER = 10**9
# Those of LLaMA-60M.
MATRICES = 56


Report = Callable[[str, int, int], None]


class Row(NamedTuple):
    """One parameter and its optimizer. ``most``: launches a step between refreshes may make."""

    name: str
    method: str
    shape: tuple[int, int]
    rank: int | None
    most: int
    options: dict[str, Any] = {}
    int8: bool = False


MATRIX = (4096, 4096)
ROWS = [
    Row("GaLore", "GaLoreAdamW", MATRIX, 256, 4),
    Row("GaLore, 4096 x 11008", "GaLoreAdamW", (4096, 11008), 256, 4),
    Row("GaLore, stochastic", "GaLoreAdamW", MATRIX, 256, 4, {"weight_rounding": "stochastic"}),
    Row("GaLore, 8-bit", "GaLoreAdamW8bit", MATRIX, 256, 4),
    Row("Fira", "FiraAdamW", MATRIX, 256, 5),
    Row("APOLLO", "APOLLOAdamW", MATRIX, 256, 5),
    Row("APOLLO-Mini, rank 1", "APOLLOMini", MATRIX, 1, 5),
    Row("DCT between selections", "DCTAdamW", MATRIX, 256, 6, {"update_proj_gap": NEVER}),
    Row("Q-GaLore, int8 weights", "QGaLoreAdamW8bit", MATRIX, 256, 5, {}, True),
    Row("embedding 32000 x 4096, not compressed", "GaLoreAdamW", (32000, 4096), None, 2),
    Row("the same, int8 moments", "GaLoreAdamW8bit", (32000, 4096), None, 2),
    Row("the same, compensated", "GaLoreAdamW", (32000, 4096), None, 2, {"weight_rounding": "compensated"}),
]


class Launches(NamedTuple):
    """What one step launched, in order, the bytes that it read and wrote, and those of them that are moments."""

    names: list[str]
    moved: int
    moments: int


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, report: Report) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name.removeprefix("aten::"), func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and not name.startswith(NO_KERNEL):
            self.report(name, _size((args, kwargs, out)) + (_size(out) if func._schema.is_mutable else 0), 0)
        return out


def _size(values: Any) -> int:
    tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Kernel:
    """In the place of a Triton kernel: called with a grid and arguments, it reports itself."""

    def __init__(self, name: str, arguments: Sequence[str], report: Report) -> None:
        self.name, self.arguments, self.report = name, arguments, report

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.arguments, args))
        twice = [value for name, value in given.items() if name in IN_PLACE]
        moments = [value for name, value in given.items() if name.startswith("exp_avg")]
        self.report(self.name, _size(args) + _size(twice), 2 * _size(moments))


@contextmanager
def stubbed(kernel: Callable[[str, Sequence[str]], Any]) -> Iterator[None]:
    """Every Triton kernel replaced by what ``kernel`` makes of its name and the names of its arguments."""
    import lowrank_kernels

    patches = []
    for info in pkgutil.iter_modules(lowrank_kernels.__path__):
        module = importlib.import_module(f"lowrank_kernels.{info.name}")
        for name, found in vars(module).items():
            if name.endswith("_kernel"):
                patches.append(mock.patch.object(module, name, kernel(name.removesuffix("_kernel"), found.arg_names)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def parameter(row: Row, device: str) -> tuple[nn.Parameter, object]:
    """In bf16 with a gradient, and what must not be freed before it."""
    rows, columns = row.shape
    p = nn.Parameter(torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    holder: object = None
    if row.int8:
        # Python's indexing of a CUDA tensor needs a torch that was built for CUDA, even if the tensor is fake.
        with mock.patch.object(layers.Int8Linear, "from_weight_"):
            holder = layer = layers.Int8Linear(columns, rows, dtype=p.dtype, device=device, weight=p)
        p = layer.weight
    p.grad = torch.empty(rows, columns, dtype=p.dtype, device=device)
    return p, holder


def launches(row: Row) -> Launches:
    """Of one step between refreshes."""
    found: list[tuple[str, int, int]] = []

    def report(*launch: Any) -> None:
        found.append(launch)

    # Tables that are made once for a device would be fake ones, of no use later.
    kept = [mock.patch.dict(table) for table in (blockwise._TABLES, fixed_basis.BUILT)]
    with FakeTensorMode(allow_non_fake_inputs=True), stubbed(partial(_Kernel, report=report)), kept[0], kept[1]:
        p, holder = parameter(row, "cuda")
        optimizer = getattr(lowrank_optim, row.method)([p], lr=1e-3, rank=row.rank, **row.options)
        state = optimizer.plan_of(p, optimizer.param_groups[0]).state
        # As if the first step, which refreshes, had been made; what is allocated once is allocated in the second.
        state["step"], state["waiting"] = 1, 0
        optimizer.step()
        found.clear()
        with _Count(report):
            optimizer.step()
        del holder
    names, moved, moments = zip(*found)
    return Launches(list(names), sum(moved), sum(moments))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors take the path of CUDA tensors, and no kernel runs."""

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    nothing = Nothing()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with (
        stubbed(lambda name, arguments: nothing),
        mock.patch.object(ops, "is_gpu", lambda device: True),
        mock.patch.object(finite, "host_looks", lambda device: False),
    ):
        # Without matrix units an update in fp32 would be torch's.
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32


class _Graph:
    def replay(self) -> None:
        pass


STUBS: tuple[tuple[str, Any], ...] = (("CUDAGraph", _Graph), ("graph", nullcontext))


@contextmanager
def prepared(method: str, matrices: int, *, replayed: bool = False) -> Iterator[Callable[[], object]]:
    """A step between refreshes on tiny matrices, as on a GPU; ``replayed``: by a graph that is there already."""
    graph, capture = (mock.patch.object(torch.cuda, name, stub) for name, stub in STUBS)
    with as_on_a_gpu(), graph, capture:
        params = [nn.Parameter(torch.zeros(16, 16)) for _ in range(matrices)]
        for p in params:
            p.grad = torch.zeros_like(p)
        options = {"lr": 1e-3, "rank": 4, "update_proj_gap": NEVER, "capturable": replayed}
        optimizer = getattr(lowrank_optim, method)(params, **options)
        for p in params:
            state = optimizer.plan_of(p, optimizer.param_groups[0]).state
            state["step"], state["waiting"] = torch.tensor(1.0) if replayed else 1, 0
        step = ReplayedStep(optimizer) if replayed else optimizer.step
        for _ in range(3):
            step()
        yield step


def host_seconds(method: str, *, steps: int = 20, matrices: int = MATRICES, replayed: bool = False) -> float:
    """CPU time of a step a matrix, the least of some steps: other work on the machine only adds to it."""
    with prepared(method, matrices, replayed=replayed) as step:
        return _least(step, steps) / matrices


def host_calls(method: str, *, replayed: bool = False) -> float:
    """Calls of functions, Python's and torch's, that a matrix more adds to a step: host time that no load changes."""

    def calls(matrices: int) -> int:
        with prepared(method, matrices, replayed=replayed) as step:
            found = 0

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal found
                found += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                step()
            finally:
                sys.setprofile(None)
            return found

    return (calls(9) - calls(1)) / 8


def floor_seconds(*, steps: int = 20, matrices: int = MATRICES) -> float:
    """CPU time of the two products of GaLore alone."""
    weight, basis = torch.zeros(16, 16), torch.zeros(16, 4)

    def run() -> None:
        for _ in range(matrices):
            weight.addmm_(torch.mm(weight, basis), basis.mT, beta=1.0, alpha=1.0)

    return _least(run, steps) / matrices


def _least(call: Callable[[], object], steps: int) -> float:
    call()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


HOST = ("GaLoreAdamW", "GaLoreAdamW8bit", "FiraAdamW", "APOLLOAdamW", "DCTAdamW")


PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN = "<!-- table:launches -->"


def table(figures: Mapping[str, Any]) -> str:
    """The Markdown of what :func:`main` wrote."""
    steps = []
    for row in figures["rows"]:
        moved, moments = (row[key] / row["values"] for key in ("moved", "moments"))
        names = ", ".join(row["launches"])
        steps.append((row["name"], str(len(row["launches"])), f"{moved:.1f}", f"{moments:.2g}", names))
    hosts = [("two products of torch alone", "3", f"{figures['floor_us']:.1f}", "1", "–", "–")]
    for method, row in figures["host"].items():
        times = f"{row['us'] / figures['floor_us']:.0f}"
        replayed = f"{row['replayed_calls']:.0f}", f"{row['replayed_us']:.1f}"
        hosts.append((method, f"{row['calls']:.0f}", f"{row['us']:.0f}", times, *replayed))
    lines = [
        markdown(("a step of", "launches", "bytes a value of the weight", "of these moments", ""), steps, {1, 2, 3}),
        "",
        f"Between refreshes; weights in bf16, {MATRIX[0]} x {MATRIX[1]} if nothing else is said, rank 256.",
        "",
        markdown(("the host, a matrix", "calls", "µs", "times two products of torch", "replayed: calls", "µs"), hosts),
        "",
        f"Of {figures['matrices']} matrices, on {figures['machine']['processor']}; kernels and graphs are stubs.",
        f"Made by `{figures['command']}` and `python -m benchmarks.table`.",
    ]
    return "\n".join(lines)


def current() -> str:
    """The table from the figures in ``results``.

    Raises:
        ValueError: nothing was counted.
    """
    figures = read_result("launches")
    if figures is None:
        raise ValueError("Invalid results: no launches.json, run python -m benchmarks.launches")
    return table(figures)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0]).parse_args(
        argv
    )
    torch.set_num_threads(1)
    rows = []
    for row in ROWS:
        names, moved, moments = launches(row)
        values = row.shape[0] * row.shape[1]
        rows.append({"name": row.name, "launches": names, "moved": moved, "moments": moments, "values": values})
    host = {}
    for method in HOST:
        host[method] = {"calls": host_calls(method), "us": 1e6 * host_seconds(method)}
        host[method] |= {"replayed_calls": host_calls(method, replayed=True)}
        host[method] |= {"replayed_us": 1e6 * host_seconds(method, replayed=True)}
    figures = {"rows": rows, "host": host, "floor_us": 1e6 * floor_seconds(), "matrices": MATRICES}
    path = write_result("launches", torch.device("cpu"), figures)
    print(current())
    print(path)


if __name__ == "__main__":
    main()
