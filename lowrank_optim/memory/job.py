"""A training job: options of the trainer, with defaults of a single small micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_optim.pretrain.config import QUANTIZED, Options
from lowrank_optim.pretrain.optimizers import parse_optimizer_args

# The options that memory depends on; they are the flags of lowrank-memory, and what a job is in JSON.
MEMORY_OPTIONS = (
    *("model", "dtype", "weights", "parameterization", "parameterization_args", "ranks", "checkpointing"),
    *("checkpoint_every", "chunked_loss", "optimizer", "optimizer_args", "grad_clip", "per_layer"),
    *("seq_len", "batch_size", "accumulate", "accumulate_dtype"),
)


@dataclass(kw_only=True)
class Job(Options):
    """What is trained and how, in one process.

    ``optimizer_args`` and ``parameterization_args`` may be mappings; they are kept as ``key=value`` pairs. What is not
    given takes the value published for the model's size, as in a run of ``train_llama.py``.
    """

    dtype: str = "bf16"
    batch_size: int = 1
    seq_len: int = 256
    accumulate: int = 1
    optimizer_args: Any = field(default_factory=list)
    parameterization_args: Any = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("optimizer_args", "parameterization_args"):
            given = getattr(self, name)
            if isinstance(given, Mapping):
                setattr(self, name, [f"{key}={value}" for key, value in given.items()])

    def as_dict(self) -> dict[str, Any]:
        """``MEMORY_OPTIONS`` for JSON; :class:`Job` takes them back."""
        values = {name: value for name, value in asdict(self).items() if name in MEMORY_OPTIONS}
        args = parse_optimizer_args(self.optimizer_args)
        layers = parse_optimizer_args(self.parameterization_args, "parameterization")
        return {**values, "optimizer_args": args, "parameterization_args": layers}

    @property
    def method(self) -> str:
        """Optimizer, arguments and parameterization, as a call."""
        layers = f", {self.parameterization}" if self.parameterization else ""
        return f"{self.optimizer}({', '.join(self.optimizer_args)}){layers}"

    @property
    def setting(self) -> str:
        """Everything else but the model, in words."""
        words = [self.dtype, f"{self.weights} weights" if self.weights in QUANTIZED else ""]
        words.append(f"{self.accumulate} x {self.batch_size} x {self.seq_len} tokens")
        words += ["per-layer updates" * self.per_layer, "checkpointing" * self.checkpointing]
        return ", ".join(filter(None, words))
