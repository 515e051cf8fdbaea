"""Replace a model's linear layers by parameterized ones, and back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_optim.nn.base import FactoredLinear, Parameterization
from lowrank_optim.nn.lowrank import LowRank
from lowrank_optim.optim.groups import as_targets, takes
from lowrank_optim.optim.roles import roles_by_id


def convert(
    model: nn.Module,
    parameterization: Parameterization,
    targets: str | Iterable[str] | None = None,
    *,
    from_weight: bool = False,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[str]:
    """Replace the matching ``nn.Linear`` modules of ``model`` in place.

    Biases, devices and dtypes stay. A module that stands in several places stays one module, and so do
    modules that share their weight and bias. Works on the meta device; :func:`reset_parameters` then fills
    the layers after ``to_empty``.

    Args:
        model: any module; its optimizer is made afterwards.
        parameterization: the options, for example ``SLTrain(rank=128)``.
        targets: None or ``"all"`` takes every ``nn.Linear`` that is a hidden matrix (see
            :func:`lowrank_optim.optim.roles.roles`); otherwise what the name of a replaced module contains, or, as a
            regular expression, matches fully. Heads and routers stay even then, and so do layers whose weight the
            code of the module around them reads, as T5's and Mamba's does.
        from_weight: keep the trained weight as closely as the parameterization can, instead of starting afresh.
        ranks: of layers by the name of their weight, as :func:`lowrank_optim.allocate_ranks` makes them, in place of
            the parameterization's own.
        seed: the layers draw from generators seeded by this and by their position in the model.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: a target that matches nothing or a layer whose weight other code reads, a layer that is converted
            already, options that do not fit a layer, ranks of other layers or for a parameterization without one, or a
            weight shared with a module that stays.
    """
    chosen = select_linears(model, targets)
    check_shared(model, chosen)
    given = dict(ranks or {})
    for weight in given:
        if weight.removesuffix(".weight") not in chosen or not weight.endswith(".weight"):
            raise ValueError(f"Invalid ranks: {weight!r} is not the weight of a layer to convert")
    positions = layer_positions(model)
    made: dict[tuple[int, int], FactoredLinear] = {}
    # Build all before touching the model: an error leaves it as it was.
    for name, linear in chosen.items():
        if sharing_key(linear) in made:
            continue
        if from_weight and linear.weight.is_meta:
            raise ValueError(f"Invalid from_weight: True, but the weight of {name!r} is on the meta device")
        try:
            rank = given.get(f"{name}.weight")
            options: Any = parameterization
            layer = (options if rank is None else dataclasses.replace(options, rank=rank)).build(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
                generator=layer_generator(seed, positions[linear]),
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        if from_weight:
            with torch.no_grad():
                layer.from_weight_(linear.weight)
        layer.bias = linear.bias
        made[sharing_key(linear)] = layer.train(linear.training)
    for name, linear in chosen.items():
        model.set_submodule(name, made[sharing_key(linear)])
    return list(chosen)


def compress(model: nn.Module, ranks: Mapping[str, int]) -> list[str]:
    """Replace trained linear layers by the low-rank factors that are nearest to their weights, in place::

        W = U Σ Vᵀ -> B A,   B = U_r sqrt(Σ_r),   A = sqrt(Σ_r) V_rᵀ

    Fine-tuning the smaller model is what follows. A layer that its factors would make larger stays as it is, that is
    where rank (m + n) >= m n.

    Args:
        model: any module.
        ranks: of the layers by the name of their weight, such as ``allocate_ranks(model, budget)``.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: as :func:`convert`, or ranks that make no layer smaller.

    Source: WeLore (arXiv 2407.11239), section 3; PELA (arXiv 2310.10700).

    Deviations: WeLore freezes what stays dense, PELA holds features and products near the original's by two further
    losses; both are the fine-tuning's to do. WeLore also replaces layers that become larger by it.
    """
    sizes = {f"{name}.weight": linear.weight.shape for name, linear in select_linears(model, None).items()}
    foreign = [name for name in ranks if name not in sizes]
    if foreign:
        raise ValueError(f"Invalid ranks: {foreign[0]!r} is not the weight of a linear layer")
    smaller = {name: rank for name, rank in ranks.items() if rank * sum(sizes[name]) < sizes[name].numel()}
    if not smaller:
        raise ValueError("Invalid ranks: none makes its layer smaller, expected rank (m + n) < m n for one")
    # A pattern, because a plain name also stands for those that contain it.
    targets = [f"(?:{re.escape(name.removesuffix('.weight'))})" for name in smaller]
    return convert(model, LowRank(), targets, from_weight=True, ranks=smaller)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn every parameterized layer back into an ``nn.Linear`` with the weight that it computes, in place.

    Returns:
        The same model.

    Raises:
        ValueError: a model without such layers.
        RuntimeError: a layer with an activation between its factors; the model stays as it was.
    """
    layers = {name: m for name, m in _named_modules(model) if isinstance(m, FactoredLinear) and name}
    if not layers:
        raise ValueError(f"Invalid model: {type(model).__name__} holds no parameterized layer to merge")
    for layer in layers.values():
        if layer.nonlinear:
            raise layer.no_dense_weight()
    made: dict[FactoredLinear, nn.Linear] = {}
    for name, layer in layers.items():
        if layer not in made:
            weight = layer.dense_weight()
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=weight.dtype)
            linear.weight = nn.Parameter(weight)
            linear.register_parameter("bias", layer.bias)
            made[layer] = linear.train(layer.training)
        # At once, so that the factors of one layer go before the weight of the next comes.
        model.set_submodule(name, made[layer])
    return model


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, on the CPU, that the model would have after :func:`merge`; the model stays as it is.

    Raises:
        RuntimeError: a layer with an activation between its factors.
    """
    state = model.state_dict()
    for name, layer in _named_modules(model):
        if not isinstance(layer, FactoredLinear):
            continue
        for key in layer.state_dict():
            if key != "bias":
                del state[f"{name}.{key}"]
        # One dense weight at a time beside the factors.
        state[f"{name}.weight"] = layer.dense_weight().cpu()
    return {key: tensor.cpu() for key, tensor in state.items()}


def reset_parameters(model: nn.Module, *, seed: int = 0) -> None:
    """Draw every parameterized layer anew, biases too, as :func:`convert` with this seed had drawn it.

    For models that were converted on the meta device, after ``to_empty``.

    Raises:
        ValueError: a model without such layers.
    """
    positions = layer_positions(model)
    layers = list(factored_layers(model).values())
    if not layers:
        raise ValueError(f"Invalid model: {type(model).__name__} holds no parameterized layer to reset")
    for layer in layers:
        position = positions[layer]
        layer.reset_parameters(layer_generator(seed, position))


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """The parameterized layers by name, each once, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def layer_generator(seed: int, position: int, epoch: int = 0) -> torch.Generator:
    """A CPU generator of its own for one layer; ``epoch`` counts the restarts of a layer that draws again."""
    mixed = np.random.SeedSequence([seed, position, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def layer_positions(model: nn.Module) -> dict[nn.Module, int]:
    """The position of every linear layer, dense or parameterized: it does not depend on what is converted."""
    order: dict[tuple[int, int], int] = {}
    positions: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, FactoredLinear)):
            # Tied linears become one layer, so they count once.
            key = sharing_key(module) if isinstance(module, nn.Linear) else (id(module), 0)
            positions[module] = order.setdefault(key, len(order))
    return positions


def sharing_key(linear: nn.Linear) -> tuple[int, int]:
    """Equal for linears that share weight and bias."""
    return id(linear.weight), id(linear.bias)


def select_linears(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules that :func:`convert` would replace, by name."""
    wanted = as_targets(targets)
    hits = dict.fromkeys(wanted, 0)
    known = roles_by_id(model)
    chosen: dict[str, nn.Linear] = {}
    candidates: list[str] = []
    readers = _read_by_their_owners(model)
    for name, module in _named_modules(model):
        # Subclasses of nn.Linear have reasons of their own: quantized weights, or a parent that reads .weight.
        if not name or not (isinstance(module, FactoredLinear) or type(module) is nn.Linear):
            continue
        role = known[id(module.weight)] if isinstance(module, nn.Linear) else "matrix"
        if not takes("all", name, role):
            continue
        candidates.append(name)
        matched = [target for target in wanted if takes(target, name, role)]
        if name in readers:
            if targets not in (None, "all") and matched:
                raise ValueError(
                    f"Invalid targets: {matched} match {name!r}, whose weight {readers[name]} reads itself; a layer in "
                    "parts has none, so it must stay an nn.Linear"
                )
            continue
        for target in matched:
            hits[target] += 1
        if matched and isinstance(module, FactoredLinear):
            raise ValueError(f"Invalid model: {name!r} is already a {type(module).__name__}; merge(model) goes back")
        if matched and isinstance(module, nn.Linear):
            chosen[name] = module
    missed = [target for target, count in hits.items() if not count]
    if missed or not chosen:
        others = {type(m).__name__ for m in model.modules() if any(p.ndim == 2 for p in m.parameters(False))}
        others -= {"Linear", "Embedding"}
        elsewhere = f", but matrices in {', '.join(sorted(others))}" if others else ""
        some = ", ".join(candidates) or f"none{elsewhere}"
        raise ValueError(f"Invalid targets: {missed or wanted} match no nn.Linear; candidates: {some[:300]}")
    return chosen


def _read_by_their_owners(model: nn.Module) -> dict[str, str]:
    """The linears whose ``weight`` the code of the module around them reads, by name, with the class that does."""
    return {
        f"{path}.{child}" if path else child: type(owner).__name__
        for path, owner in _named_modules(model)
        for child, module in owner.named_children()
        if isinstance(module, nn.Linear) and re.search(rf"self\.{child}\.weight\b", _source(_class_of(owner)))
    }


def _class_of(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _source(cls: Any) -> str:
    # torch's own transformer layers read weights only where they leave their linears out.
    if cls.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(cls)
    # Written at a prompt, or compiled.
    except (OSError, TypeError):
        return ""


def check_shared(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """Raise ValueError where a chosen linear shares its weight with a module that stays."""
    owners = {id(linear.weight): (name, sharing_key(linear)) for name, linear in chosen.items()}
    for name, module in _named_modules(model):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in owners:
                continue
            owner, identity = owners[id(parameter)]
            same = name in chosen and sharing_key(chosen[name]) == identity
            if not same:
                raise ValueError(
                    f"Invalid targets: {owner!r} shares its weight with {name}.{key}, which would stay dense or has "
                    "another bias; untie them first, or choose other targets"
                )
