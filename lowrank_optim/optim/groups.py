"""Which parameters a method compresses: from flat tensors, from names, from groups."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

# One dotted component of a parameter's name that keeps it full-rank.
_FULL_RANK = re.compile(r"(\w*(embed|norm)\w*|ln\w*|wte|wpe|(lm_|output_)?head|output_layer|classifier|bias)")


def keeps_full_rank(name: str, param: Tensor) -> bool:
    """Whether a named parameter is an embedding, a head, a norm, a bias, or no matrix at all."""
    return param.ndim < 2 or any(_FULL_RANK.fullmatch(part) for part in name.lower().split("."))


def low_rank_groups(
    model: nn.Module, *, targets: str | Iterable[str] = ("attn", "mlp"), **options: Any
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a low-rank and a full-rank group.

    Args:
        model: any module; tied parameters count once.
        targets: what the name of a low-rank parameter contains, or, as a regular expression, matches
            fully. Embeddings, heads, norms, biases and vectors stay full-rank even then.
            ``"all"`` takes everything else.
        options: the low-rank group's hyper-parameters (``rank=128, update_proj_gap=200, ...``); what is
            absent takes the optimizer's value.

    Returns:
        Two groups with ``params`` and ``param_names``, the low-rank one first; the second has ``rank: None``
        and is left out where it would be empty.

    Raises:
        ValueError: a target that matches no parameter.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hits = dict.fromkeys(targets, 0)
    low: list[tuple[str, Tensor]] = []
    full: list[tuple[str, Tensor]] = []
    for name, p in named:
        matched = [] if keeps_full_rank(name, p) else [t for t in targets if matches(t, name)]
        for target in matched:
            hits[target] += 1
        (low if matched else full).append((name, p))
    missed = [target for target, count in hits.items() if not count]
    if missed or not low:
        some = ", ".join(name for name, p in named if not keeps_full_rank(name, p)) or "none"
        raise ValueError(f"Invalid targets: {missed or targets} match no matrix; candidates: {some[:300]}")
    groups: list[dict[str, Any]] = [_named_group(low, **options)]
    if full:
        groups.append(_named_group(full, rank=None))
    return groups


def matches(target: str, name: str) -> bool:
    """Whether a name contains ``target`` or, as a regular expression, matches it fully; "all" matches any."""
    return target == "all" or target in name or re.fullmatch(target, name) is not None


def _named_group(named: list[tuple[str, Tensor]], **options: Any) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named], **options}


def as_groups(params: Any) -> tuple[list[dict[str, Any]], bool]:
    """The groups of an optimizer from whatever its constructor got.

    - Tensors: one group; the rank compresses every matrix that it can.
    - ``(name, tensor)`` pairs: two groups; embeddings, heads, norms and biases stay full-rank.
    - Groups: as they are. Where one of them names a ``rank``, those that name none are full-rank, as in the
      published packages.

    Returns:
        The groups, and whether the key ``rank`` is used as a switch.

    Raises:
        ValueError: no parameters.
        TypeError: neither tensors, pairs nor groups.
    """
    if isinstance(params, (Tensor, dict, str)):
        raise TypeError(f"params must be an iterable of tensors, named tensors or dicts, got {type(params).__name__}")
    params = list(params)
    if not params:
        raise ValueError("Invalid params: empty, expected at least one parameter")
    if isinstance(params[0], dict):
        switched = any(group.get("rank") is not None for group in params)
        return [dict(group) for group in params], switched
    if isinstance(params[0], tuple):
        low = [(name, p) for name, p in params if not keeps_full_rank(name, p)]
        full = [(name, p) for name, p in params if keeps_full_rank(name, p)]
        groups = [_named_group(low)] if low else []
        return [*groups, *([_named_group(full, rank=None)] if full else [])], False
    return [{"params": params}], False
