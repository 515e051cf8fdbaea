"""Optimizers and per-layer updates for the ``Trainer`` of transformers, and for trainers that derive from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.optim.engine import OF_PARAMS, LowRankOptimizer
from lowrank_optim.optim.groups import low_rank_groups
from lowrank_optim.optim.in_backward import StepInBackward, step_in_backward
from lowrank_optim.optim.roles import Role, roles

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What the Trainer leaves without weight decay.
UNDECAYED = frozenset({"norm", "bias"})
Groups = list[dict[str, Any]]
Factory = Callable[[], Callable[..., LowRankOptimizer]]


def trainer_optimizer(
    cls: type[LowRankOptimizer],
    args: TrainingArguments,
    *,
    groups: Callable[[nn.Module], Groups] = low_rank_groups,
    **options: Any,
) -> tuple[Factory, dict[str, Any]]:
    """An optimizer of this package for ``Trainer(optimizer_cls_and_kwargs=...)``, transformers 5.2 or newer.

    ::

        trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(GaLoreAdamW, args, rank=128), ...)

    The Trainer makes the optimizer when its model is ready (sharded, or made by ``model_init``), so that groups and
    names are those of the model that is trained. As in its own optimizers, norms and biases have no weight decay.

    Args:
        cls: the optimizer.
        args: its ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` become lr,
            weight_decay, betas and eps, where the optimizer has them in that form. Their defaults are AdamW's, not the
            published ones of the method: LDAdamW's betas and GaLore's eps, for instance, are to be given.
        groups: the parameter groups of a model; ``functools.partial(low_rank_groups, targets=("attn", "mlp"))``, or
            ``spectral_groups`` and ``factor_groups`` for the layers of :mod:`lowrank_optim.nn`.
        options: further arguments of the optimizer, which come before those of ``args``.

    Returns:
        A factory as the Trainer takes it, and the options.

    Raises:
        TypeError: an option that the optimizer does not have; from the Trainer, as the optimizer is made there.
    """
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    own = inspect.signature(cls).parameters
    taken = {name: value for name, value in given.items() if name in own}
    if isinstance(own["eps"].default, tuple):
        # Adafactor's two are not Adam's one.
        del taken["eps"]
    return partial(partial, _make, cls, groups), {**taken, **options}


def _make(
    cls: type[LowRankOptimizer], groups: Callable[[nn.Module], Groups], model: nn.Module, **options: Any
) -> LowRankOptimizer:
    known = roles(model)
    return cls([part for group in groups(model) for part in _by_decay(group, known)], **options)


def _by_decay(group: dict[str, Any], known: Mapping[str, Role]) -> Groups:
    """A full-rank group without its norms and biases, then these without weight decay; others as they are."""
    if group.get("rank", ...) is not None:
        return [group]
    keys = [key for key in OF_PARAMS if key in group]
    rows: tuple[list[Any], list[Any]] = ([], [])
    for name, row in zip(group["param_names"], zip(*(group[key] for key in keys))):
        rows[known[name] in UNDECAYED].append(row)
    decayed, undecayed = (dict(zip(keys, map(list, zip(*some)))) for some in rows)
    return [{**group, **decayed}] * bool(decayed) + [{**group, **undecayed, "weight_decay": 0.0}] * bool(undecayed)


class PerLayer:
    """Updates within the backward pass (:func:`lowrank_optim.step_in_backward`) for a Trainer, in front of it::

        class PerLayerTrainer(PerLayer, Trainer): ...

    It takes the Trainer's arguments as they are: ``gradient_accumulation_steps`` micro-batches are summed at low rank
    where the method can, ``max_grad_norm`` clips by the norm of the update before, and ``grad_norm`` in the log is that
    of the gradients that were used. ``resume_from_checkpoint`` continues to the last bit. The last update of an epoch
    may have fewer micro-batches.

    Raises:
        TypeError: an optimizer of another package.
        ValueError: ``fp16``, whose loss scaling needs all gradients at once.

    Not supported: DistributedDataParallel and DeepSpeed; see :func:`lowrank_optim.step_in_backward`.
    """

    handle: StepInBackward | None = None
    args: TrainingArguments
    optimizer: Optimizer | None
    current_gradient_accumulation_steps: int

    def create_optimizer(self, *args: Any) -> Optimizer:
        """The Trainer's optimizer, attached to the backward pass."""
        if self.args.fp16:
            raise ValueError("Invalid fp16: True, expected bf16=True: loss scaling needs all gradients at once")
        is_new = self.handle is None or self.optimizer is None
        optimizer: Any = super().create_optimizer(*args)  # type: ignore[misc]
        if is_new:
            self.handle = step_in_backward(
                optimizer,
                accumulate=self.args.gradient_accumulation_steps,
                max_norm=self.args.max_grad_norm or None,
            )
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch."""
        assert self.handle is not None
        self.handle.accumulate = self.current_gradient_accumulation_steps
        with self.handle.micro_batch():
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer logs; the gradients that it would take the norm of are gone."""
        if "grad_norm" in logs and self.handle is not None and self.handle.grad_norm is not None:
            logs["grad_norm"] = self.handle.grad_norm.item()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
