"""Loss, gradient norm and evaluation, each exact over the tokens that count."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_optim.ops.linear_cross_entropy import linear_cross_entropy
from lowrank_optim.optim.in_backward import vector_norm
from lowrank_optim.optim.views import is_sharded
from lowrank_optim.pretrain.batches import IGNORED, Batch


def loss_sum(model: Any, batch: Batch, *, chunked: bool = False) -> Tensor:
    """Sum of the next-token losses of one micro-batch, a scalar in fp32; ``chunked``: never with all logits at once."""
    targets = batch.labels[:, 1:].flatten()
    if chunked:
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
        head = model.get_output_embeddings().weight
        return linear_cross_entropy(hidden.flatten(0, 1), head, targets, ignore_index=IGNORED)
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


class LossSum(nn.Module):
    """:func:`loss_sum` as a module, for DistributedDataParallel and ``torch.compile`` to wrap, head included."""

    def __init__(self, model: nn.Module, *, chunked: bool) -> None:
        super().__init__()
        self.model, self.chunked = model, chunked

    def forward(self, batch: Batch) -> Tensor:
        return loss_sum(self.model, batch, chunked=self.chunked)


def clip_gradients_(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The norm of all gradients together, in fp32; scales them to ``largest`` where it exceeds that (0: never).

    Of a sharded model it is the norm over all processes; parameters that ``fully_shard`` ignores count once.
    """
    grads: list[Tensor] = []
    parts: list[Tensor] = []
    for p in parameters:
        if p.grad is not None:
            (parts if is_sharded(p.grad) else grads).append(p.grad)
    norm = _norm(grads)
    if parts:
        from lowrank_optim.optim.sharding import local, shards_of

        # One mesh for all.
        shards, parts = shards_of(parts[0]), [local(part) for part in parts]
        norm = norm.hypot(shards.sum_(_norm(parts).square()).sqrt())
        grads += parts
    if largest > 0 and grads:
        # A norm that is not finite scales nothing: such an update is skipped as a whole.
        factor = torch.where(norm.isfinite(), (largest / norm).clamp(max=1.0), 1.0)
        torch._foreach_mul_(grads, factor)
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([vector_norm(tensor) for tensor in tensors]).norm() if tensors else torch.zeros(())


def share_of(batches: int, *, rank: int, world: int) -> int:
    """How many of the first ``batches`` micro-batches are this process', which takes every ``world``-th one."""
    return max(0, -(-(batches - rank) // world))


def in_step(batches: Iterator[Batch], reduce: Callable[[Tensor], Tensor]) -> Iterator[Batch]:
    """The micro-batches of this process, then empty ones until all processes have come to their end.

    Every forward pass of a sharded model needs all of them.
    """
    empty = torch.zeros((1, 2), dtype=torch.long)
    while True:
        batch = next(batches, None)
        if not int(reduce(torch.tensor(int(batch is not None)))):
            return
        yield Batch(empty, empty + IGNORED) if batch is None else batch


class Evaluation(NamedTuple):
    """Mean loss over so many tokens; ``stopped`` where it has not come to its end and there is none."""

    loss: float
    tokens: int
    stopped: bool = False

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    limit: int,
    legacy: bool,
    device: torch.device,
    chunked: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Mean next-token loss of at most ``limit`` micro-batches (0 = all) of this process, and of all through ``reduce``.

    ``model`` may be wrapped as :class:`LossSum`. It ends early where ``stopping``, which is asked before every
    micro-batch, is true on this process or on another.

    The mean is over tokens, so it does not depend on the batch size. ``legacy`` takes the mean of the batches'
    means and divides by their number plus one, as the harness does from which the published tables come.
    """
    network = model if isinstance(model, LossSum) else LossSum(model, chunked=chunked)
    was_training = model.training
    model.eval()
    # loss, tokens, sum of batch means, batches, processes that stopped
    total = torch.zeros(5, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for batch in itertools.islice(batches, limit or None):
            if stopping():
                total[4] = 1
                break
            loss, tokens = network(batch.to(device)).item(), batch.targets
            if tokens:
                total += torch.tensor([loss, tokens, loss / tokens, 1, 0], dtype=torch.float64)
    model.train(was_training)
    loss, count, means, number, stopped = reduce(total).tolist()
    if stopped or not count:
        return Evaluation(math.nan, 0, bool(stopped))
    return Evaluation(means / (number + 1) if legacy else loss / count, int(count))
