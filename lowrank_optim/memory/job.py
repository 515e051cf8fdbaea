"""A training job, and the one training step that is simulated, measured, and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.memory.plan import Estimate, build_network, estimate
from lowrank_optim.nn import Int8Linear
from lowrank_optim.optim.in_backward import StepInBackward, step_in_backward
from lowrank_optim.pretrain.data import Batch
from lowrank_optim.pretrain.optimizers import build_optimizer
from lowrank_optim.pretrain.steps import clip_gradients_, loss_sum

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class Job:
    """What is trained and how.

    Attributes:
        model: a preset, a ``config.json`` or its folder.
        optimizer: a name that :func:`lowrank_optim.pretrain.optimizers.build_optimizer` takes.
        optimizer_args: its constructor's arguments.
        parameterization: of the attention and MLP matrices, None for dense ones.
        parameterization_args: its options; what is not given takes the value published for the model's size.
        dtype: of weights, gradients and activations: "bf16", "fp16", "fp32".
        weights: "int8" stores the attention and MLP matrices in 8 bits, "bf16" everything in ``dtype``.
        batch_size: sequences of a micro-batch.
        seq_len: their tokens.
        accumulate: micro-batches of an update.
        accumulate_dtype: of the sums of low-rank gradients that per-layer updates keep: "fp32" or "bf16".
        per_layer: update each parameter during backward, as soon as its gradient is there.
        checkpointing: keep the inputs of the decoder layers only, and compute the rest again in backward.
    """

    model: str
    optimizer: str
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    parameterization: str | None = None
    parameterization_args: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    weights: str = "bf16"
    batch_size: int = 1
    seq_len: int = 256
    accumulate: int = 1
    accumulate_dtype: str = "fp32"
    per_layer: bool = False
    checkpointing: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def method(self) -> str:
        """Optimizer, arguments and parameterization, as a call."""
        args = [f"{key}={value}" for key, value in self.optimizer_args.items()]
        return f"{self.optimizer}({', '.join(args)})" + (f", {self.parameterization}" if self.parameterization else "")

    @property
    def setting(self) -> str:
        """Everything else but the model, in words."""
        words = [self.dtype, "int8 weights" if self.weights == "int8" else ""]
        words.append(f"{self.accumulate} x {self.batch_size} x {self.seq_len} tokens")
        words += ["per-layer updates" * self.per_layer, "checkpointing" * self.checkpointing]
        return ", ".join(filter(None, words))

    def estimate(self) -> Estimate:
        """What the job keeps between two updates, in closed form."""
        return estimate(
            self.model, self.optimizer, self.optimizer_args, DTYPES[self.dtype],
            self.parameterization, self.parameterization_args, weights=self.weights, per_layer=self.per_layer,
        )  # fmt: skip

    def build_model(self, device: str) -> Any:
        """The model with freshly drawn weights, or without values on ``device="meta"``."""
        dtype = DTYPES[self.dtype]
        model, _ = build_network(
            self.model, device, dtype, self.parameterization, self.parameterization_args, self.weights
        )
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def materialize(self, device: str) -> Any:
        """The model with random weights, made tensor by tensor, so that no second one is ever in memory."""
        if self.parameterization is not None:
            return self.build_model(device)
        model = self.build_model("meta")
        allocate_(model, device)
        randomize_(model)
        # Its buffers are no weights: they are computed from the configuration.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
        return model

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return build_optimizer(self.optimizer, model, args=self.optimizer_args)

    def batches(self, vocabulary: int, device: str) -> list[Batch]:
        """The micro-batches of one update, of random tokens."""
        tokens = torch.randint(vocabulary, (self.accumulate, self.batch_size, self.seq_len)).to(device)
        return [Batch(ids, ids) for ids in tokens]


def allocate_(model: nn.Module, device: str) -> None:
    """Give a model on the meta device tensors on another one, of undefined values; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    # The parameter of an int8 weight has strides of zero: it has one element.
                    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                    made[tensor] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    made[tensor].__dict__.update(tensor.__dict__)
                tensors[name] = made[tensor]  # type: ignore[assignment]


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Fresh weights, a matrix at a time: N(0, 0.02²), and one in vectors."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.from_weight_(
                torch.empty_like(module.weight, memory_format=torch.contiguous_format).normal_(std=0.02)
            )
            continue
        for p in module.parameters(recurse=False):
            p.fill_(1) if p.ndim < 2 else p.normal_(std=0.02)


def hooks(job: Job, optimizer: Optimizer) -> StepInBackward | None:
    """What updates in backward, where the job does.

    Raises:
        ValueError: an optimizer that cannot update one parameter at a time.
    """
    if not job.per_layer:
        return None
    try:
        return step_in_backward(
            optimizer,  # type: ignore[arg-type]
            accumulate=job.accumulate,
            max_norm=GRAD_CLIP,
            sum_dtype=DTYPES[job.accumulate_dtype],
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


Phase = Callable[[str], AbstractContextManager[None]]


def train_update(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    handle: StepInBackward | None,
    batches: Sequence[Batch],
    phase: Phase = lambda _: nullcontext(),
) -> float:
    """One update of the parameters from ``batches``; the mean loss."""
    tokens = job.accumulate * job.batch_size * (job.seq_len - 1)
    total = 0.0
    for batch in batches:
        with handle.micro_batch() if handle else nullcontext():
            with phase("forward"):
                loss = loss_sum(model, batch, chunked=True) / tokens
            with phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            del loss
    with phase("update"):
        if handle is None:
            clip_gradients_(model.parameters(), GRAD_CLIP)
            optimizer.step()
        optimizer.zero_grad()
    return total
