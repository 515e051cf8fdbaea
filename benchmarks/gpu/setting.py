"""What all pieces share: the device, sizes that suit it, and a clock."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.gpu import record


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark, as a piece sees it.

    Attributes:
        out: the folder of ``gpu.jsonl``.
        scratch: a folder that is removed with everything in it.
        ends: time.time() at which the piece has to be over.
        tokens: a .npy file of uint16 token ids to train on, None where there is none.
        updates: of a training run in the convergence piece.
    """

    out: Path
    scratch: Path
    ends: float
    tokens: Path | None
    updates: int
    device: torch.device
    device_name: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the piece has to be over."""
        return self.ends - time.time()

    def figures(self, piece: str) -> list[dict[str, Any]]:
        """What has been recorded of a piece."""
        return [row for row in record.read(self.out / record.FILE) if row["piece"] == piece]

    def ms(self, run: Callable[[], Any]) -> float:
        """Milliseconds of a call on the device, the median of many, with L2 flushed before each.

        On the CPU of one call, which only shows that it works.
        """
        if self.cuda:
            from triton.testing import do_bench

            return float(do_bench(run, warmup=10, rep=60, return_mode="median"))
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def tiny_model(folder: Path) -> str:
    """A LLaMA for the CPU, as a config.json in a folder."""
    path = folder / "tiny.json"
    fields = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"vocab_size": 8192, "max_position_embeddings": 64}
    path.write_text(json.dumps({"model_type": "llama", **fields}), encoding="utf-8")
    return str(path)


def kernel_module(operation: Callable[..., Any]) -> Any:
    """The module of ``lowrank_kernels`` with the twin of an operation."""
    return importlib.import_module(f"lowrank_kernels.{operation.__name__.removesuffix('_')}")


def start_device() -> tuple[torch.device, str]:
    """The device and its name; without a GPU, Triton's interpreter, which wants to be chosen before any kernel."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    torch.set_num_threads(1)
    kernels.interpret()
    return torch.device("cpu"), "cpu"
