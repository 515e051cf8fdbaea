"""What a run says: banner, methods, log line, memory table."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_optim.pretrain.checkpoint import Progress
from lowrank_optim.pretrain.config import QUANTIZED, Resolved
from lowrank_optim.pretrain.steps import perplexity_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEPT = ("weights", "gradients", "optimizer")
# Dense bf16 peaks of NVIDIA's data sheets, FLOP/s; the first name found in the device's name counts.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned columns, numbers to the right; the first row is the head."""
    text = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    left = [isinstance(cell, str) for cell in rows[-1]]
    lines = [
        "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left)).rstrip()
        for row in text
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(cell: Any) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:,.1f}"


def banner(options: Resolved, config: PreTrainedConfig, model: nn.Module, *, world: int, device: str) -> str:
    """Model, budget and options of a run."""
    parameters = sum(p.numel() for p in model.parameters())
    slots = options.batch_size * options.accumulate * world * options.seq_len
    total = slots * options.max_steps
    shape = f"hidden {config.hidden_size}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}"
    shown = {k: v for k, v in asdict(options).items() if v not in (None, False, []) and k != "dry_run"}
    layers = " ".join([options.parameterization or "dense", *options.parameterization_args])
    layers += f" with {options.weights} weights" if options.weights in QUANTIZED else ""
    restarts = " ".join([f", restarts {options.restarts}", *options.restart_args] * (options.restarts != "none"))
    shown["optimizer_args"] = " ".join(options.optimizer_args) or "its defaults"
    return "\n".join(
        [
            f"model      {options.model}: {parameters:,} parameters ({shape}), {options.dtype}, {layers}",
            f"optimizer  {options.optimizer} {shown['optimizer_args']}, peak lr {options.lr}{restarts}",
            f"update     {options.batch_size} sequences x {options.accumulate} micro-batches x {world} processes"
            f" x {options.seq_len} tokens = {slots:,} tokens",
            f"run        {options.max_steps:,} updates, {total:,} tokens, {total / parameters:.2f} a parameter",
            f"device     {device}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            "options    " + ", ".join(f"{k}={v}" for k, v in shown.items()),
        ]
    )


def method_table(optimizer: Optimizer, model: nn.Module) -> str:
    """Which kind of parameter gets which method and why, one row a kind."""
    explain = getattr(optimizer, "explain", None)
    if explain is None:
        name = type(optimizer).__name__
        rows = [(n, tuple(p.shape), name, "its own rule") for n, p in model.named_parameters()]
    else:
        rows = [tuple(row) for row in explain()]
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), *rest) for name, *rest in rows)
    body = [(name, " x ".join(map(str, shape)), n, *why) for (name, shape, *why), n in kinds.items()]
    return table([("parameter", "shape", "number", "method", "why"), *body])


def memory_table(rows: Sequence[tuple[str, str, Mapping[str, int]]]) -> str:
    """Methods, the dtypes of their states and their bytes of weights, gradients and optimizer state, in MiB."""
    body = [
        (name, dtype, *(sizes[k] / 2**20 for k in KEPT), sum(sizes[k] for k in KEPT) / 2**20)
        for name, dtype, sizes in rows
    ]
    return table([("MiB", "state dtype", "weights", "gradients", "optimizer state", "total"), *body])


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Bytes now and at the peak: allocated tensors on CUDA, resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return resident("VmRSS"), resident("VmHWM")


def resident(key: str) -> int:
    """Resident memory of the process in bytes: now (VmRSS) or at the peak (VmHWM), where there is no Linux the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        # Kilobytes, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Data-sheet FLOP/s of a device, None where it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in BF16_PEAKS.items() if key in name), None)


def flops_per_token(config: PreTrainedConfig, parameters: int, seq_len: int) -> float:
    """Forward and backward: 6 a weight that multiplies, and 6 * layers * hidden * seq_len of causal attention."""
    embedding = config.vocab_size * config.hidden_size
    return 6.0 * (parameters - embedding) + 6.0 * config.num_hidden_layers * config.hidden_size * seq_len


class Meter:
    """Turns updates into log lines: rates since the last line, memory, time of refreshes, remaining time."""

    def __init__(
        self, options: Resolved, config: PreTrainedConfig, model: nn.Module, *, start: int, device: torch.device
    ) -> None:
        self.options, self.device, self.start = options, device, start
        peak = peak_flops(device, options.dtype)
        parameters = sum(p.numel() for p in model.parameters())
        slots = options.batch_size * options.accumulate * options.seq_len
        flops = slots * flops_per_token(config, parameters, options.seq_len)
        # How long an update of this process would take at the device's peak.
        self.ideal_seconds = flops / peak if peak else None
        self.began = self.last = time.perf_counter()

    def update(self, step: int, tokens: int) -> float:
        """Tokens per second of one update, without padding; call it once per update."""
        now = time.perf_counter()
        self.seconds, self.last = now - self.last, now
        self.step, self.rate = step, tokens / self.seconds
        return self.rate

    def rewind(self, step: int) -> None:
        """The run has gone back to ``step``."""
        self.start, self.began = step, time.perf_counter()

    def skip(self) -> None:
        """Leave the time since the last update (an evaluation, a checkpoint) out of the rate."""
        self.last = time.perf_counter()

    def line(self, loss: float, lr: float, grad_norm: float, refresh_seconds: float) -> str:
        """One log line of the last update."""
        now, peak = memory_in_use(self.device)
        total = self.options.max_steps
        left = (time.perf_counter() - self.began) / (self.step - self.start) * (total - self.step)
        mfu = f"{self.ideal_seconds / self.seconds:.1%}" if self.ideal_seconds else "n/a"
        return (
            f"step {self.step:>{len(str(total))}}/{total} | loss {loss:.4f} | lr {lr:.3e} | grad norm {grad_norm:.3f}"
            f" | {self.rate:,.0f} tokens/s | MFU {mfu} | memory {now / 2**20:,.0f}/{peak / 2**20:,.0f} MiB"
            f" | refresh {refresh_seconds:.1f} s | ETA {duration(left)}"
        )


def progress_bar(options: Resolved, done: int, *, show: bool) -> Any:
    """A bar over the updates, a line every ten seconds where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=options.max_steps,
        initial=done,
        disable=not show,
        unit="update",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )


def write(text: str) -> None:
    """Print above a progress bar that may be there."""
    from tqdm import tqdm

    # Redrawing the bar around every line is for terminals.
    try:
        (tqdm.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()
    except OSError:
        # A terminal that is gone or a full disk behind a pipe ends what is said, not the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def summary(progress: Progress, loss: float, folder: Path, *, seconds: float) -> str:
    """The last lines of a run."""
    untrained = math.nan if progress.untrained_loss is None else perplexity_of(progress.untrained_loss)
    return "\n".join(
        [
            f"validation perplexity {perplexity_of(loss):.2f}, before training {untrained:.2f}",
            f"{progress.step:,} updates, {progress.tokens:,} tokens, {duration(seconds)}",
            f"run folder {folder}",
        ]
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
