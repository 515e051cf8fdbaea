"""The peak of a training job, from the real training step on tensors without data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lowrank_optim.memory.materialize import allocate_, random_batches
from lowrank_optim.memory.tracker import Peak, Tracker
from lowrank_optim.ops import dct
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.subspaces import fixed_basis
from lowrank_optim.pretrain.build import build_network, optimizer_for, settle
from lowrank_optim.pretrain.config import Options, Resolved
from lowrank_optim.pretrain.update import Updater

# With a gap of two, these are an update of each kind.
UPDATES = ("first update", "update between refreshes", "update with a refresh")


def simulate(options: Options) -> Peak:
    """The peak of the bytes alive over three updates, one with a first basis, one with a new one, one between them.

    The training step is the real one, with its hooks, checkpoints and optimizer; no memory of the job's size is used.
    What an operation of a device allocates and frees inside of itself is not seen.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`.

    Raises:
        UserError, ValueError, RuntimeError: as :func:`lowrank_optim.pretrain.build.build` raises them.
    """
    run, config = settle(options)
    model = build_network(run, config, "meta")
    with (
        _without_cached_tensors(),
        _as_if_with_data(),
        FakeTensorMode(allow_non_fake_inputs=True),
        Tracker() as tracker,
    ):
        allocate_(model, "cpu")
        tracker.label([*model.parameters(), *model.buffers()], "weights")
        tracker.watch(model)
        optimizer = optimizer_for(run, model)
        _shorten_gap_(optimizer)
        update = _watched_updater(run, model, optimizer, tracker)
        batches = random_batches(run, config.vocab_size, "cpu")
        tracker.label([tensor for batch in batches for tensor in batch], "other")
        for name in UPDATES:
            tracker.part(name)
            update(batches, run.accumulate * run.batch_size * (run.seq_len - 1))
        return tracker.peak()


def _shorten_gap_(optimizer: Optimizer) -> None:
    """Let an update of each kind come within three updates."""
    for group in optimizer.param_groups:
        # Staggered refreshes come a few at a time: a gap of two would make them come in halves.
        if group.get("update_proj_gap", 1) > 1 and not group.get("stagger"):
            group["update_proj_gap"] = 2


def _watched_updater(run: Resolved, model: nn.Module, optimizer: Optimizer, tracker: Tracker) -> Updater:
    """The run's updater, which books gradients as such and updates to the name of their parameter."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    trained = [p for p in names if p.requires_grad]
    phases = ExitStack()

    def arrives(param: Tensor) -> None:
        tracker.label([param.grad], "gradients")
        if run.per_layer:
            phases.enter_context(tracker.during("update", names[param]))

    for p in trained:
        p.register_post_accumulate_grad_hook(arrives)  # type: ignore[no-untyped-call]
    # Between the two, as hooks run in the order of their registration.
    update = Updater(run, model, optimizer, phase=tracker.during)
    handle = update.in_backward

    def leaves(param: Tensor) -> None:
        phases.close()
        sums = handle._sums.get(param) if handle is not None else None
        if sums is not None:
            tracker.label([sums.low, sums.sketch], "gradients")

    for p in trained:
        p.register_post_accumulate_grad_hook(leaves)  # type: ignore[no-untyped-call]
    if isinstance(optimizer, LowRankOptimizer) and not run.per_layer:
        update_param = optimizer.update_param

        def tracked(param: Tensor, *rest: Any) -> None:
            with tracker.during("update", names[param]):
                update_param(param, *rest)

        optimizer.update_param = tracked  # type: ignore[assignment, method-assign]
    return update


@contextmanager
def _without_cached_tensors() -> Iterator[None]:
    """Keep tensors without data out of the caches of functions, and the cached ones out of the simulation."""
    _clear_caches()
    try:
        yield
    finally:
        _clear_caches()


@contextmanager
def _as_if_with_data() -> Iterator[None]:
    """Keep transformers from taking tensors without data for a trace, for which it builds masks that a run has not."""
    from transformers.utils import import_utils

    # Older versions have no such check.
    check = getattr(import_utils, "is_fake_tensor", None)
    if check is None:
        yield
        return
    import_utils.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = check


def _clear_caches() -> None:
    fixed_basis.BUILT.clear()
    dct.PLANS.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("lowrank_optim."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
