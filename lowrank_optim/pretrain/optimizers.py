"""Optimizers by class name, for the command lines: ours, then torch.optim, then bitsandbytes.optim."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lowrank_optim
from lowrank_optim.optim.validation import nearest

# LBFGS evaluates the loss several times a step, SparseAdam takes sparse gradients only, PytorchLARS is the
# yardstick of bitsandbytes' own tests.
_UNFIT = {"Optimizer", "LBFGS", "SparseAdam", "PytorchLARS"}
# Ours whose groups are the layers of lowrank_optim.nn; they need a model that was converted.
_OF_LAYERS: dict[str, Callable[[nn.Module], list[dict[str, Any]]]] = {
    "LOROAdamW": lowrank_optim.factor_groups,
    "SSTAdamW": lowrank_optim.spectral_groups,
}
_WORDS = {"none": None, "true": True, "false": False}


def parse_optimizer_args(pairs: Sequence[str], kind: str = "optimizer") -> dict[str, Any]:
    """Keyword arguments from ``key=value`` strings.

    Values are Python literals (``rank=128``, ``betas=(0.9,0.95)``), ``none``/``true``/``false`` in any case,
    or else plain strings (``proj_type=std``). ``kind`` is what errors call them.

    Raises:
        ValueError: a pair without ``=``, key or value, or a key given twice.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = (part.strip() for part in pair.partition("="))
        if not key.isidentifier() or not value:
            raise ValueError(f"Invalid {kind} argument: {pair!r}, expected key=value, for example rank=128")
        if key in parsed:
            raise ValueError(f"Invalid {kind} argument: {key!r} is given twice")
        parsed[key] = _literal(value)
    return parsed


def optimizer_names() -> list[str]:
    """Every NAME that :func:`build_optimizer` takes on this machine."""
    return list(dict.fromkeys([*_own_classes(), *_torch_classes(), *_bitsandbytes_classes()]))


def low_rank_names() -> list[str]:
    """The optimizers of this package that compress the matrices of any model."""
    return [name for name in _own_classes() if name not in _OF_LAYERS]


def accepted_arguments(name: str) -> list[str]:
    """The keyword arguments of an optimizer, ``targets`` included where only some parameters are taken.

    Raises:
        ValueError: unknown optimizer.
        RuntimeError: a bitsandbytes optimizer where bitsandbytes is not installed.
    """
    cls = _resolve(name)
    named = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    return [key for key in named if key != "params"] + ["targets"] * (name in low_rank_names())


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    args: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over the trainable parameters of ``model``, which may be on the meta device.

    Ours take the hidden matrices that :func:`lowrank_optim.low_rank_groups` selects and give
    the rest the full-rank rule. LOROAdamW and SSTAdamW take a model with layers of their parameterization.

    Args:
        name: a class of ``lowrank_optim``, ``torch.optim`` or ``bitsandbytes.optim``, in this order.
        model: holds the parameters.
        lr: learning rate; None leaves the class's default.
        weight_decay: None leaves the class's default.
        args: further constructor arguments; ``targets`` goes to ``low_rank_groups``.

    Raises:
        ValueError: unknown optimizer or argument (the nearest is named), a value that the class refuses,
            or a model without a parameter to select.
        RuntimeError: a bitsandbytes optimizer where bitsandbytes is not installed.
    """
    cls = _resolve(name)
    options = dict(args or {})
    for key, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is None:
            continue
        if key in options:
            raise ValueError(f"Invalid optimizer argument: {key!r} is also given as an option of its own")
        options[key] = value
    allowed = accepted_arguments(name)
    check_keys(f"argument for {name}", options, allowed)
    selection = {"targets": options.pop("targets")} if "targets" in options else {}
    try:
        if name in _OF_LAYERS:
            return cls(_OF_LAYERS[name](model), **options)
        if name in _own_classes():
            # In groups the key "rank" is the switch; the class's other options are defaults of every group.
            if "rank" in allowed:
                selection["rank"] = options.pop("rank", inspect.signature(cls).parameters["rank"].default)
            return cls(lowrank_optim.low_rank_groups(model, **selection), **options)
        return cls([(n, p) for n, p in model.named_parameters() if p.requires_grad], **options)
    except (TypeError, IndexError) as error:
        # What constructors raise on a value of the wrong kind, such as betas=0.9 or eps=tiny.
        raise ValueError(f"Invalid arguments for {name}: {options} ({error})") from error


def check_keys(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError on a key that is not known; the nearest is named."""
    for key in given:
        if key not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(f"Invalid {what}: {key!r}, expected {expected}" + nearest(key, known))


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _resolve(name: str) -> type[torch.optim.Optimizer]:
    for classes in (_own_classes, _torch_classes, _bitsandbytes_classes):
        found = classes().get(name)
        if found is not None:
            return found
    absent = importlib.util.find_spec("bitsandbytes") is None
    if absent and (name.endswith(("8bit", "32bit")) or name.startswith("Paged")):
        raise RuntimeError(f"{name} needs bitsandbytes, which is not installed: pip install 'lowrank-optim[train]'")
    own = ", ".join(_own_classes())
    raise ValueError(
        f"Invalid optimizer: {name!r}, expected {own} or a class of torch.optim or bitsandbytes.optim"
        + nearest(name, optimizer_names())
    )


def _own_classes() -> dict[str, type[torch.optim.Optimizer]]:
    return _optimizers(lowrank_optim, lowrank_optim.__all__)


def _torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    return _optimizers(torch.optim, vars(torch.optim))


def _bitsandbytes_classes() -> dict[str, type[torch.optim.Optimizer]]:
    try:
        import bitsandbytes
    except ImportError:
        return {}
    return _optimizers(bitsandbytes.optim, vars(bitsandbytes.optim))


def _optimizers(module: Any, names: Iterable[str]) -> dict[str, type[torch.optim.Optimizer]]:
    found = {name: getattr(module, name) for name in names if name not in _UNFIT}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
