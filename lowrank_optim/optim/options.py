"""The options that every optimizer has, their checks, and errors that name the nearest option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypedDict

from lowrank_optim.ops import BACKENDS
from lowrank_optim.optim.parts import REQUIRED, Group, Option
from lowrank_optim.optim.state_storage import STATE_DTYPES
from lowrank_optim.optim.validation import check_choice, check_positive_int, check_range, nearest
from lowrank_optim.optim.weight_storage import WEIGHT_ROUNDINGS


class Common(TypedDict, total=False):
    """Options of every optimizer of the package; a group may set each for itself.

    stagger: spread the refreshes of the parameters over the gap, so that no step does all of them.
    state_dtype: how moments are stored: "float32" (fp64 for fp64 parameters), "bfloat16" (rounded stochastically) or
        "int8" (bitsandbytes' blockwise format; moments of fewer than 4096 values stay fp32), or "int4" (the maps of
        arXiv 2309.01507, rounded stochastically, without a kernel). The arithmetic is fp32 in each; complex moments
        stay as they are.
    weight_rounding: how bfloat16 weights are written: "nearest", "stochastic", or "compensated" (an int8 correction is
        kept beside the weight, 24 bits together). It has no effect on weights of more bits.
    maximize: ascend.
    capturable: keep the step counter on the device, so that a CUDA graph can replay the step. A graph never refreshes:
        run one step outside of it every ``update_proj_gap`` steps.
    backend: None (a Triton kernel on CUDA where there is one, else eager), "eager" or "triton".
    """

    stagger: bool
    state_dtype: str
    weight_rounding: str
    maximize: bool
    capturable: bool
    backend: str | None


def one_of(*choices: Any) -> Callable[[str, Any], None]:
    """A check for one of ``choices``."""
    return partial(check_choice, choices=choices)


def number(low: float = 0.0, high: float = float("inf"), *, high_open: bool = False) -> Callable[[str, Any], None]:
    """A check for a number, or a tensor of one element, in [low, high] or [low, high)."""
    return partial(check_range, low=low, high=high, high_open=high_open)


def natural(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"Invalid {name}: {value!r}, expected a non-negative int")


def optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """``check``, or None."""
    return partial(_check_optional, check=check)


def _check_optional(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    if value is not None:
        check(name, value)


flag = one_of(True, False)
positive_int = check_positive_int
optional_positive_int = partial(check_positive_int, optional=True)

# Read by the engine itself.
ENGINE: Mapping[str, Option] = {
    "lr": Option(number()),
    "weight_decay": Option(number(), 0.0),
    "rank": Option(optional_positive_int),
    "update_proj_gap": Option(positive_int, 200),
    "stagger": Option(flag, False),
    "state_dtype": Option(one_of(*STATE_DTYPES), "float32"),
    "weight_rounding": Option(one_of(*WEIGHT_ROUNDINGS), "nearest"),
    "maximize": Option(flag, False),
    "capturable": Option(flag, False),
    "backend": Option(one_of(*BACKENDS), None),
    # Set by step_in_backward: a refresh may be under way from one update to the next.
    "two_phase": Option(flag, False),
}
# What schedulers, wrappers and the package itself write into a group.
BOOKKEEPING = frozenset(
    {
        *("params", "param_names", "param_roles", "name", "clip_norm", "differentiable"),
        *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
    }
)
# Parts of a group that change during a run and say nothing about the state.
VOLATILE = frozenset({"lr", "weight_decay", "adamw_lr"})


def complete(defaults: Mapping[str, Any], known: Mapping[str, Option], owner: str) -> dict[str, Any]:
    """``defaults`` with the defaults of all other known options.

    Raises:
        TypeError: an option without a default is missing, or one is not known.
    """
    for name in defaults:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}{nearest(name, known)}")
    missing = [name for name, option in known.items() if name not in defaults and option.default is REQUIRED]
    if missing:
        raise TypeError(f"{owner} misses the option {missing[0]!r}, which its parts read and which has no default")
    return {**{name: option.default for name, option in known.items()}, **defaults}


def check_names(group: Group, known: Iterable[str], owner: str) -> None:
    """Raise ValueError on a key of a group that is no option."""
    known = set(known)
    for name in group:
        if name not in known and name not in BOOKKEEPING:
            raise ValueError(
                f"Invalid option {name!r} in a parameter group: {owner} does not have it{nearest(name, known)}"
            )


def arguments(of_constructor: dict[str, Any]) -> dict[str, Any]:
    """The options of an optimizer by name, from the ``locals()`` of its constructor."""
    options = {name: value for name, value in of_constructor.items() if name not in ("self", "params", "__class__")}
    common = options.pop("common", {})
    return {**options, **common}


def expand_signature(cls: type) -> None:
    """Give a class a signature in which the options of :class:`Common` stand by name, for ``help`` and ``inspect``."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return
    named = {p.name for p in parameters}
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=ENGINE[name].default, annotation=annotation)
        for name, annotation in Common.__annotations__.items()
        if name not in named
    ]
    cls.__signature__ = signature.replace(parameters=[*parameters[:-1], *common])  # type: ignore[attr-defined]
