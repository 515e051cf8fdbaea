"""The peak of a training job, from the real training step on tensors without data."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from types import FunctionType
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lowrank_optim.memory.alike import repeated
from lowrank_optim.memory.materialize import allocate_, random_batches
from lowrank_optim.memory.tracker import Peak, Tracker
from lowrank_optim.ops import chunks, dct, int8_weight
from lowrank_optim.optim import in_backward, state_storage
from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.subspaces import fixed_basis
from lowrank_optim.pretrain.build import build_network, optimizer_for, settle
from lowrank_optim.pretrain.config import Options, Resolved
from lowrank_optim.pretrain.llama import build_model
from lowrank_optim.pretrain.update import Updater

# With a gap of two, these are an update of each kind; where micro-batches are summed, a refresh takes two updates.
UPDATES = ("first update", "update between refreshes", "update with a refresh")
SECOND_HALF = "update after a refresh"
# The first micro-batch, one that adds to it, and the last: those between are like the second.
MICRO_BATCHES = 3
# The first layer, one that stands for all between, and the last.
LAYERS = 3


def simulate(options: Options, *, whole: bool = False) -> Peak:
    """The peak of the bytes alive over an update of each kind: with a first basis, with a new one, between them.

    The training step is the real one, with its hooks, checkpoints and optimizer; no memory of the job's size is used.
    What an operation of a device allocates and frees inside of itself is not seen. What repeats is run a few times and
    counted as often as it occurs: layers and parameters that are alike, micro-batches, passes over a matrix in parts.

    Args:
        options: of a run, or a :class:`lowrank_optim.memory.job.Job`.
        whole: run every layer, every parameter and every micro-batch.

    Raises:
        UserError, ValueError, RuntimeError: as :func:`lowrank_optim.pretrain.build.build` raises them.
    """
    run, config = settle(options)
    layers, times = (None, 1) if whole else _alike(run, config)
    if layers is not None:
        config = with_layers(config, LAYERS)
    model = build_network(run, config, "meta")
    with (
        without_cached_tensors(),
        as_if_with_data(),
        two_parts_of_a_pass(),
        FakeTensorMode(allow_non_fake_inputs=True),
        Tracker(layers and f"{layers}.1", times) as tracker,
        ExitStack() as stack,
    ):
        allocate_(model, "cpu")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tracker.label([tensor], "weights", name)
        tracker.watch(model)
        optimizer = optimizer_for(run, model)
        shorten_gap_(optimizer)
        if isinstance(optimizer, LowRankOptimizer) and not whole:
            stack.enter_context(repeated(tracker, optimizer))
        update = _watched_updater(run, model, optimizer, tracker)
        batches = random_batches(run, config.vocab_size, "cpu")
        tracker.label([tensor for batch in batches for tensor in batch], "other")
        parts = _parts(run, optimizer)
        # A micro-batch between first and last sees every sum; what is summed for a refresh is there in the last two.
        fullest = parts[2:] if SECOND_HALF in parts else parts[1:2]
        for part in parts:
            tracker.part(part)
            used = batches if whole else batches[: MICRO_BATCHES if part in fullest else MICRO_BATCHES - 1]
            if update.in_backward is not None:
                update.in_backward.accumulate = len(used)
            update(used, run.accumulate * run.batch_size * (run.seq_len - 1))
            for name, p in model.named_parameters():
                state = optimizer.state.get(p, {})
                tracker.label([value for value in state.values() if isinstance(value, Tensor)], "optimizer", name)
        return tracker.peak()


def _alike(run: Resolved, config: Any) -> tuple[str | None, int]:
    """Where the layers of a model stand that are alike, None where they are not, and how many stand for the second."""
    number = config.num_hidden_layers
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == number]
    every_one = run.checkpoint_every == 1 or not run.checkpointing
    if number <= LAYERS or not every_one or any(value != value[:1] * number for value in lists):
        return None, 1
    model = build_model(config, device="meta")
    path = layers_of(model, number)
    if path is None:
        return None, 1
    kinds = [[(name, p.shape, p.dtype) for name, p in layer.named_parameters()] for layer in model.get_submodule(path)]
    return (path, number - LAYERS + 1) if kinds == kinds[:1] * number else (None, 1)


def layers_of(model: nn.Module, number: int) -> str | None:
    """The path of the outermost list of so many layers."""
    lists = (path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    return next(lists, None)


def with_layers(config: Any, number: int) -> Any:
    """The configuration of a model of fewer layers, all of them alike."""
    config = copy.deepcopy(config)
    before = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:number])
    config.num_hidden_layers = number
    return config


def _parts(run: Resolved, optimizer: Optimizer) -> tuple[str, ...]:
    """The updates that differ: where nothing is renewed, every one is like the second."""
    if not isinstance(optimizer, LowRankOptimizer):
        return UPDATES[:2]
    renewed = [
        (p, group)
        for group in optimizer.param_groups
        if group["update_proj_gap"] > 1
        for p in group["params"]
        if (subspace := optimizer.parts_of(p, group).subspace) is not None and subspace.refreshes
    ]
    sums = run.per_layer and run.accumulate > 1 and any(optimizer.accumulates(p, group) for p, group in renewed)
    return UPDATES[:2] if not renewed else (*UPDATES, SECOND_HALF) if sums else UPDATES


def shorten_gap_(optimizer: Optimizer) -> None:
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
        sums = handle.sums(param) if handle is not None else None
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
def without_cached_tensors() -> Iterator[None]:
    """Keep tensors without data out of the caches of functions, and the cached ones out of the simulation."""
    _clear_caches()
    try:
        yield
    finally:
        _clear_caches()


def as_if_with_data() -> AbstractContextManager[Any]:
    """Keep transformers from taking tensors without data for a trace, for which it builds masks that a run has not."""
    from transformers.utils import import_utils

    # Older versions have no such check, and do not miss it.
    return patch.object(import_utils, "is_fake_tensor", lambda _: False, create=True)


@contextmanager
def two_parts_of_a_pass() -> Iterator[None]:
    """Let passes over a matrix in parts end after two: every part makes tensors like those of the one before."""
    whole = chunks.chunks, chunks.row_blocks, int8_weight.row_slices, state_storage.slices, in_backward.eighths
    passes: dict[Any, Any] = {
        function: (lambda *args, function=function: islice(function(*args), 2)) for function in whole
    }
    _replace(passes)
    try:
        yield
    finally:
        _replace({short: function for function, short in passes.items()})


def _replace(functions: Mapping[Any, Any]) -> None:
    """Put others in the place of functions, in all modules of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lowrank_optim."):
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in functions:
                    setattr(module, key, functions[value])


def _clear_caches() -> None:
    fixed_basis.BUILT.clear()
    dct.PLANS.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("lowrank_optim."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
