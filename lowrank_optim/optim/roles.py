"""What a parameter is: a hidden matrix, stacked experts, an embedding, a head, a router, a norm, a bias, ...

The module tree is asked first: the types of the modules, ``get_input_embeddings`` and ``get_output_embeddings``, tied
weights, the neighbours of experts, sides as long as the vocabulary. Names come last, and alone where nothing else is
there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Role = Literal[
    "matrix", "experts", "embedding", "head", "router", "norm", "bias", "vector", "convolution", "tensor", "other"
]

# What is compressed unless it is left out, and what is compressed only where a target names it.
HIDDEN: frozenset[Role] = frozenset({"matrix", "experts"})
ON_REQUEST: frozenset[Role] = frozenset({"convolution", "tensor"})

_TEXT: dict[Role, str] = {
    "matrix": "hidden matrix",
    "experts": "stacked experts",
    "embedding": "embedding",
    "head": "output head",
    "router": "router",
    "norm": "norm",
    "bias": "bias",
    "vector": "vector",
    "convolution": "convolution",
    "tensor": "more than two dimensions, but not stacked experts",
    "other": "not a linear map",
}

# Components of a lower-case name. First those that say enough wherever they stand.
_EMBEDDING = re.compile(r"\w*embed\w*|(\w+_)?emb[sd]?|wte|wpe")
_HEAD = re.compile(r"((lm|output|shared)_)?head|classifier")
_ROUTER = re.compile(r"\w*router\w*")
_EXPERTS = re.compile(r"\w*experts?\w*")
# The last one, but for ``weight``.
_NORM = re.compile(r"\w*norm\w*|ln\w*")
_BIAS = re.compile(r"(\w+_)?bias(es)?(_\w+)?")
# The parameter's own: it multiplies element by element, or is looked up.
_NO_MAP = re.compile(r"a_logs?|time_(mix|decay|first|faaaa)\w*|\w*(tokens?|latents|queries|tables?|scales?|codebooks?)")
# Within a layer hidden matrices have these names too: the heads of an attention, the output of BERT's and RWKV's.
_HEAD_OUTSIDE = re.compile(r"(\w+_)?heads?|output_layer|qa_outputs|seq_relationship|logits?")
_HEAD_AT_THE_TOP = re.compile(r"outputs?|output_projection|proj_out|scorer?")
_EMBEDDING_AT_THE_TOP = re.compile(r"shared")
_GATE = re.compile(r"gate|gating")
# What wrappers and models put in front.
_WRAPPERS = frozenset({"module", "model", "transformer", "base_model", "_orig_mod", "_fsdp_wrapped_module"})


def describe(role: Role) -> str:
    """The words for a role, as the reason why a parameter is compressed or not."""
    return _TEXT[role]


def role_of_name(name: str, param: Tensor) -> Role:
    """What a parameter is, by its name and shape alone; :func:`roles` knows better where there is a module."""
    parts = name.lower().split(".")
    role = _by_name(name, param, inside=any(part.isdigit() for part in parts))
    # It may be the gate of a SwiGLU, which costs memory; a compressed router would cost quality.
    return "router" if role == "matrix" and any(_GATE.fullmatch(part) for part in parts) else role


def roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter of a model is, by the names of ``named_parameters``, where tied parameters stand once.

    The first answer counts: a vector; an embedding by the module's type or by ``get_input_embeddings``, and what is
    tied to one; a head by ``get_output_embeddings``; a router beside experts; a convolution, norm, router or experts
    by the module that holds it; outside of the repeated layers, a head with a side as long as the vocabulary or the
    labels; the name; a head that is the model's last matrix and follows its layers; a hidden matrix.
    """
    known = roles_by_id(model)
    return {name: known[id(param)] for name, param in model.named_parameters()}


def roles_by_id(model: nn.Module) -> dict[int, Role]:
    """:func:`roles` by ``id`` of the parameter, for those that are met under several names."""
    tree = dict(model.named_modules(remove_duplicate=False))
    places = list(_places(tree))
    grouped: dict[int, list[_Place]] = {}
    for place in places:
        grouped.setdefault(id(place.param), []).append(place)
    inside = {key for key, group in grouped.items() if any(place.inside for place in group)}
    inputs = _given_by(tree, "get_input_embeddings") - inside
    outputs = _given_by(tree, "get_output_embeddings") - inside
    routers = _beside_experts(tree)
    sizes = _sizes(tree)
    found: dict[int, Role] = {}
    for key, group in grouped.items():
        if _is_vector(group[0].param):
            found[key] = _kind_of_vector(group[0])
        elif key in inputs or any(_embeds(place.owner) for place in group):
            found[key] = "embedding"
        elif key in outputs:
            found[key] = "head"
        elif key in routers:
            found[key] = "router"
        else:
            each = [_at(place, sizes) for place in group]
            found[key] = next((role for role in each if role not in HIDDEN), each[0])
    # What follows the layers as the last matrix of all is a head, whatever its name; a square one is a pooler.
    end = [place for place in places if not _is_vector(place.param)][-1:]
    if inside and end and not end[0].inside and end[0].param.shape[0] != end[0].param.shape[1]:
        key = id(end[0].param)
        found[key] = "head" if found[key] == "matrix" else found[key]
    return found


def longer_than_hidden(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The matrices outside of the numbered layers with a side that is longer than any inside of them.

    Hidden widths come back in every layer and a vocabulary is longer, so these are embeddings or heads whose names
    say nothing. The ratio of the sides would not tell them: it is 7.8 for the head of LLaMA-7B, 16 for the keys of
    LLaMA-405B, 32 for Mamba's time steps. Without numbered layers there is nothing to compare with.
    """
    matrices = [(name, max(p.shape)) for name, p in named if p.ndim == 2]
    numbered = {name for name, _ in matrices if any(part.isdigit() for part in name.split("."))}
    widest = max((side for name, side in matrices if name in numbered), default=None)
    return [name for name, side in matrices if widest is not None and name not in numbered and side > widest]


class _Place(NamedTuple):
    """Where a parameter stands; tied parameters stand in several places."""

    path: str
    owner: nn.Module
    attribute: str
    param: Tensor
    # Whether it belongs to one of the repeated layers.
    inside: bool


def _places(tree: dict[str, nn.Module]) -> Iterator[_Place]:
    layers = _layers(tree)
    for path, module in tree.items():
        for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
            # A parametrized weight, as of weight_norm, belongs to the module that computes with it.
            of, parametrized, name = path.rpartition(".parametrizations.")
            where, own = (of, name) if parametrized else (path, attribute)
            inside = any(ancestor in layers for ancestor in _ancestors(where))
            yield _Place(where, tree[where], own, param, inside)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _layers(tree: dict[str, nn.Module]) -> set[str]:
    """The paths of repeated layers: children of a list, or one of several of a kind, that are more than one linear."""
    children: dict[str, list[str]] = {}
    for path in tree:
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)
    layers: set[str] = set()
    for path, inner in children.items():
        if not isinstance(tree[path], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        kinds = Counter(type(tree[child]) for child in inner)
        for child in inner:
            repeated = isinstance(tree[path], nn.ModuleList) or kinds[type(tree[child])] > 1
            # By the modules that hold matrices: a factored layer is one linear, whatever it holds.
            if repeated and sum(any(p.ndim > 1 for p in m.parameters(False)) for m in tree[child].modules()) > 1:
                layers.add(child)
    return layers


def _given_by(tree: dict[str, nn.Module], method: str) -> set[int]:
    """The parameters of the modules that the models in the tree name as their embeddings."""
    given: set[int] = set()
    for module in tree.values():
        # The methods are the models' own: those without embeddings raise what they like.
        with suppress(Exception):
            part = getattr(module, method)()
            if isinstance(part, nn.Module) and part is not module:
                given.update(id(p) for p in part.parameters())
    return given


def _beside_experts(tree: dict[str, nn.Module]) -> set[int]:
    """The routers among the neighbours of experts: by name, or as single matrices with one row an expert."""
    routers: set[int] = set()
    for module in tree.values():
        experts = [child for name, child in module.named_children() if _EXPERTS.fullmatch(name.lower())]
        counts = {count for child in experts for count in _number_of_experts(child)}
        if not experts:
            continue
        for name, child in module.named_children():
            matrices = [p for p in child.parameters() if p.ndim == 2]
            if _GATE.fullmatch(name.lower()):
                routers.update(map(id, matrices))
            elif len(matrices) == 1 and child not in experts and min(matrices[0].shape) in counts:
                routers.add(id(matrices[0]))
        routers.update(id(p) for p in module.parameters(False) if p.ndim == 2 and min(p.shape) in counts)
    return routers


def _number_of_experts(experts: nn.Module) -> Iterator[int]:
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        yield len(experts)
    yield from (p.shape[0] for p in experts.parameters() if p.ndim > 2)


class _Sizes(NamedTuple):
    vocabularies: set[int]
    labels: set[int]


def _sizes(tree: dict[str, nn.Module]) -> _Sizes:
    """The lengths that tell a head; in a small model the width may be the number of characters, and tells nothing."""
    configs = [getattr(module, "config", None) for module in tree.values()]
    tables = [module for module in tree.values() if isinstance(module, nn.Embedding)]
    widths = {table.embedding_dim for table in tables}
    # The longest table: positions may be as many as a hidden layer is wide.
    longest = max((table.num_embeddings for table in tables), default=None)
    vocabularies = {getattr(config, "vocab_size", None) for config in configs} | {longest}
    labels = {getattr(config, "num_labels", None) for config in configs}
    return _Sizes(*({size for size in sizes - widths if isinstance(size, int)} for sizes in (vocabularies, labels)))


def _embeds(owner: nn.Module) -> bool:
    kind = type(owner).__name__.lower()
    return isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or kind.endswith(("embedding", "embeddings"))


def _at(place: _Place, sizes: _Sizes) -> Role:
    """What a tensor of two or more dimensions is in one of its places."""
    kind, shape = type(place.owner).__name__.lower(), place.param.shape
    name = f"{place.path}.{place.attribute}" if place.path else place.attribute
    named = _by_name(name, place.param, inside=place.inside)
    if isinstance(place.owner, _ConvNd):
        return "embedding" if named == "embedding" else "convolution"
    if "norm" in kind and not isinstance(place.owner, nn.Linear):
        return "norm"
    if "router" in kind:
        return "router"
    if "expert" in kind and len(shape) > 2:
        return "experts"
    if named == "matrix" and not place.inside and (sizes.vocabularies.intersection(shape) or shape[0] in sizes.labels):
        return "head"
    return "tensor" if named == "convolution" else named


def _is_vector(param: Tensor) -> bool:
    return param.ndim < 2 or param.numel() == max(param.shape)


def _kind_of_vector(place: _Place) -> Role:
    if _BIAS.fullmatch(place.attribute.lower()):
        return "bias"
    return "norm" if "norm" in type(place.owner).__name__.lower() else "vector"


def _by_name(name: str, param: Tensor, *, inside: bool) -> Role:
    """What the name and the shape say; ``inside``: whether the parameter belongs to a repeated layer."""
    parts = name.lower().split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    attribute, last = parts[-1], parts[-2] if len(parts) > 1 and parts[-1].startswith("weight") else parts[-1]
    at_the_top = not inside and len(parts) <= 2
    if _BIAS.fullmatch(last):
        return "bias"
    if _is_vector(param):
        return "norm" if any(_NORM.fullmatch(part) for part in parts[-2:]) else "vector"
    if any(_EMBEDDING.fullmatch(part) for part in parts) or (at_the_top and _EMBEDDING_AT_THE_TOP.fullmatch(last)):
        return "embedding"
    if any(_ROUTER.fullmatch(part) for part in parts):
        return "router"
    if param.ndim > 2 and any(_EXPERTS.fullmatch(part) for part in parts):
        return "experts"
    if any(_HEAD.fullmatch(part) for part in parts) or (at_the_top and _HEAD_AT_THE_TOP.fullmatch(last)):
        return "head"
    if not inside and (
        any(_HEAD_OUTSIDE.fullmatch(part) for part in parts) or parts[-3:-1] == ["predictions", "decoder"]
    ):
        return "head"
    if _NORM.fullmatch(last):
        return "norm"
    if _NO_MAP.fullmatch(attribute):
        return "other"
    return "matrix" if param.ndim == 2 else "convolution"
