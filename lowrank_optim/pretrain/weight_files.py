"""The weights in a checkpoint: a folder that transformers loads, and the factors of a parameterized model beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowrank_optim.nn.base import FactoredLinear
from lowrank_optim.nn.convert import factored_layers
from lowrank_optim.optim.views import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORED = "factored.safetensors"
WEIGHTS = "model.safetensors"


def save_weights(model: PreTrainedModel, into: Path) -> None:
    from safetensors.torch import save_model

    layers = factored_layers(model)
    if not layers:
        # One file whatever the size, because resuming loads it in place.
        model.save_pretrained(into, max_shard_size="1000TB")
        return
    save_model(model, str(into / FACTORED))
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(into)
    if not any(layer.nonlinear for layer in layers.values()):
        _export(model, layers, into)


def _export(model: PreTrainedModel, layers: Mapping[str, FactoredLinear], into: Path) -> None:
    """Write the merged weights, of which one file of 2 GB at a time is in memory."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    with torch.device("meta"):
        dense = type(model)(model.config).to(model.dtype)
    # Tied weights are one parameter.
    split = split_torch_state_dict_into_shards(dict(dense.named_parameters()), max_shard_size="2GB")
    state = model.state_dict()

    def merged(name: str) -> torch.Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        return (state[name] if layer is None else layer.dense_weight()).cpu().contiguous()

    for file, names in split.filename_to_tensors.items():
        save_file({name: merged(name) for name in names}, str(into / file), metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (into / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def load_weights_(model: PreTrainedModel, path: Path) -> None:
    """Load what :func:`save_weights` wrote; of a sharded model every process takes its parts."""
    from safetensors import safe_open
    from safetensors.torch import load_model

    file = path / (FACTORED if factored_layers(model) else WEIGHTS)
    sharded = any(is_sharded(p) for p in model.parameters())
    with safe_open(file, framework="pt") as saved:
        names = set(saved.keys())
        same_names = names <= model.state_dict().keys()
        if same_names and not sharded:
            # Mapped files, copied tensor by tensor: a card without room for two of everything can resume.
            load_model(model, file, device="cpu")
        elif same_names:
            _load_parts(model, ((name, saved.get_tensor(name)) for name in names))
        else:
            # Of some models, those with experts for one, transformers exports tensors under the names of the hub.
            weights = type(model).from_pretrained(path, dtype=model.dtype).state_dict()
            if sharded:
                _load_parts(model, weights.items())
            else:
                model.load_state_dict(weights)


def _load_parts(model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    from lowrank_optim.optim.sharding import part_of

    targets = model.state_dict(keep_vars=True)
    parts = {name: part_of(values, targets[name]) for name, values in weights}
    found = {id(targets[name]) for name in parts}
    # Tied weights are saved once.
    lacking = [name for name, target in targets.items() if id(target) not in found]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing")
    model.load_state_dict(parts, strict=False)
