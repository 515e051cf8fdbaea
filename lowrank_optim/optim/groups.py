"""Which parameters a method compresses: from flat tensors, from names, from groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_optim.optim.roles import HIDDEN, ON_REQUEST, Role, longer_than_hidden, role_of_name, roles
from lowrank_optim.optim.weight_storage import is_quantized

Named = tuple[str, Tensor, Role]


def low_rank_groups(
    model: nn.Module, *, targets: str | Iterable[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a low-rank and a full-rank group.

    Args:
        model: any module; tied parameters count once.
        targets: None takes every hidden matrix and all stacked experts, as :func:`lowrank_optim.optim.roles.roles`
            sees them; ``"all"`` is the same. Otherwise what the name of a low-rank parameter contains, or, as a
            regular expression, matches fully: GaLore's published choice is ``("attn", "mlp")``. Embeddings, heads,
            routers, norms, biases and vectors stay full-rank even then; convolutions are taken only then.
        options: the low-rank group's hyper-parameters (``rank=128, update_proj_gap=200, ...``); what is
            absent takes the optimizer's value. A ``rank`` for every low-rank parameter by its name, as
            :func:`lowrank_optim.allocate_ranks` makes them, gives a group for every rank.

    Returns:
        Two groups with ``params``, ``param_names`` and ``param_roles``, the low-rank one first; the second has
        ``rank: None`` and is left out where it would be empty.

    Raises:
        ValueError: a target that matches no parameter, a model without a hidden matrix, or ranks of other parameters
            than the low-rank ones.
    """
    known = roles(model)
    named = [(name, p, known[name]) for name, p in model.named_parameters() if p.requires_grad]
    wanted = as_targets(targets)
    hits = dict.fromkeys(wanted, 0)
    low: list[Named] = []
    full: list[Named] = []
    for name, p, role in named:
        matched = [target for target in wanted if takes(target, name, role)]
        for target in matched:
            hits[target] += 1
        (low if matched else full).append((name, p, role))
    missed = [target for target, count in hits.items() if not count]
    if missed or not low:
        some = ", ".join(name for name, _, role in named if role in HIDDEN | ON_REQUEST) or "none"
        raise ValueError(f"Invalid targets: {missed or targets} match no matrix; candidates: {some[:300]}")
    groups: list[dict[str, Any]] = []
    if isinstance(options.get("rank"), Mapping):
        for rank, rows in _by_rank(low, options.pop("rank")):
            groups.append(_named_group(rows, rank=rank, **options))
    else:
        groups.append(_named_group(low, **options))
    if full:
        groups.append(_named_group(full, rank=None))
    return groups


def _by_rank(low: list[Named], ranks: Mapping[str, int]) -> list[tuple[int, list[Named]]]:
    names = {name for name, _, _ in low}
    if names != set(ranks):
        lacking = sorted(names - set(ranks))
        found = f"{lacking[0]!r} has none" if lacking else f"{min(set(ranks) - names)!r} is not a low-rank parameter"
        raise ValueError(f"Invalid rank: {found}, expected one for every low-rank parameter")
    return [(rank, [row for row in low if ranks[row[0]] == rank]) for rank in sorted(set(ranks.values()))]


def as_targets(targets: str | Iterable[str] | None) -> list[str]:
    """A list of targets from what the user gave; None is ``["all"]``.

    Raises:
        ValueError: something else than words and regular expressions.
    """
    if targets is None:
        return ["all"]
    try:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        for target in wanted:
            re.compile(target)
    except (TypeError, re.error) as error:
        raise ValueError(f"Invalid targets: {targets!r}, expected words or regular expressions ({error})") from error
    return wanted


def takes(target: str, name: str, role: Role) -> bool:
    """Whether a target takes a parameter of this name and role; "all" takes what is hidden."""
    return matches(target, name) and (role in HIDDEN or (role in ON_REQUEST and target != "all"))


def matches(target: str, name: str) -> bool:
    """Whether a name contains ``target`` or, as a regular expression, matches it fully; "all" matches any."""
    return target == "all" or target in name or re.fullmatch(target, name) is not None


def long_side(param: nn.Parameter) -> Any:
    """A ``shard_placement_fn`` for ``fully_shard``: splits every matrix along its longer side.

    ::

        fully_shard(layer, shard_placement_fn=long_side)

    The side that a method compresses stays whole on every process, so that projection and update need no other process.
    FSDP2 splits axes other than the first into equal parts only; where the number of processes does not divide the
    columns it splits the rows.

    Args:
        param: a matrix, or a stack (..., m, n) of matrices. Others are split along their first axis.

    Returns:
        ``torch.distributed.tensor.Shard`` of one of the last two axes, or None for FSDP2's own choice, the first axis.

    Raises:
        ValueError: a parameter of a quantized weight, which FSDP2 cannot split.
    """
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Shard

    if is_quantized(param):
        raise ValueError(
            f"Invalid parameter for fully_shard: a quantized weight of shape {tuple(param.shape)}, expected a "
            "floating-point one; train quantized weights with DistributedDataParallel(..., init_sync=False)"
        )
    axis = long_axis(param.shape, get_world_size())
    return Shard(axis) if axis > 0 else None


def long_axis(shape: Sequence[int], processes: int) -> int:
    """The axis along which :func:`long_side` splits."""
    if len(shape) < 2:
        return 0
    axis = len(shape) - 2 if shape[-2] >= shape[-1] else len(shape) - 1
    return axis if shape[axis] % processes == 0 else 0


def check_flattened(params: Iterable[Tensor]) -> None:
    """Raise ValueError on a parameter of FullyShardedDataParallel, whose shape is gone."""
    for param in params:
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"Invalid params: FullyShardedDataParallel has flattened a parameter to shape {tuple(param.shape)}, "
                "which leaves no matrix to compress; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _named_group(named: list[Named], **options: Any) -> dict[str, Any]:
    return {
        "params": [p for _, p, _ in named],
        "param_names": [name for name, _, _ in named],
        "param_roles": [role for _, _, role in named],
        **options,
    }


def as_groups(params: Any) -> tuple[list[dict[str, Any]], bool]:
    """The groups of an optimizer from whatever its constructor got.

    - Tensors: one group; the rank compresses every matrix that it can.
    - ``(name, tensor)`` pairs: two groups; what by its name is neither a hidden matrix nor stacked experts stays
      full-rank. A matrix that would be compressed although it looks like an embedding or a head is warned of.
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
        named = [(name, p, role_of_name(name, p)) for name, p in params]
        low = [row for row in named if row[2] in HIDDEN]
        full = [row for row in named if row[2] not in HIDDEN]
        _warn_of_long_matrices(low)
        groups = [_named_group(low)] if low else []
        return [*groups, *([_named_group(full, rank=None)] if full else [])], False
    return [{"params": params}], False


def _warn_of_long_matrices(low: list[Named]) -> None:
    suspects = longer_than_hidden((name, p) for name, p, _ in low)
    if suspects:
        # Seen from the line that makes the optimizer: as_groups, the base, the subclass.
        warnings.warn(
            f"{', '.join(suspects)[:300]}: compressed by name, although longer than every matrix of the layers, as "
            "embeddings and heads are; low_rank_groups(model) asks the module instead",
            stacklevel=5,
        )
