"""LLaMA by preset name, or a causal language model of transformers by its configuration; all code is transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lowrank_optim.optim.validation import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 32000
    positions: int = 1024


# The configurations of the GaLore family's C4 experiments (untied embeddings, T5 vocabulary of 32,000).
# llama_tiny is ours: the body of llama_20m, meant for a small vocabulary.
PRESETS = {
    "llama_tiny": Shape(256, 688, 4, 4, vocab=8192),
    "llama_9m": Shape(128, 352, 4, 4),
    "llama_20m": Shape(256, 688, 4, 4),
    "llama_35m": Shape(384, 1024, 6, 8),
    "llama_40m": Shape(416, 1024, 8, 8),
    "llama_60m": Shape(512, 1376, 8, 8),
    "llama_71m": Shape(512, 1368, 12, 8),
    "llama_100m": Shape(640, 1708, 12, 10, vocab=32100),
    "llama_130m": Shape(768, 2048, 12, 12),
    "llama_250m": Shape(768, 2560, 24, 16),
    "llama_350m": Shape(1024, 2736, 24, 16),
    "llama_1b": Shape(2048, 5461, 24, 32),
    "llama_3b": Shape(2560, 6848, 32, 32),
    "llama_7b": Shape(4096, 11008, 32, 32, positions=2048),
    "llama_13b": Shape(5120, 13824, 40, 40, positions=2048),
}


# Their classes for causal language modelling look at both sides unless told otherwise.
_ENCODERS = frozenset(
    {"bert", "roberta", "electra", "camembert", "xlm-roberta", "roformer", "megatron-bert", "data2vec-text"}
)


def build_config(model: str) -> PreTrainedConfig:
    """The configuration of a preset, of a ``config.json``, of a folder that holds one, or of a model on the hub.

    Args:
        model: a key of :data:`PRESETS`, a path, or a hub name.

    Raises:
        ValueError: none of these, or no causal language model that transformers itself has code for.
    """
    from transformers import LlamaConfig

    if model not in PRESETS:
        return _decoder(_read_config(model), model)
    shape = PRESETS[model]
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )


def _read_config(model: str) -> Any:
    """The configuration that a path or a hub name leads to."""
    from transformers import AutoConfig

    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        hint = nearest(model, PRESETS, cutoff=0.7)
        if hint or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or path.suffix == ".json":
            raise ValueError(
                f"Invalid model: {model!r}, expected a preset ({', '.join(PRESETS)}), a config.json or a hub name{hint}"
            )
        try:
            return AutoConfig.from_pretrained(model, trust_remote_code=False)
        # The hub client and the configurations each have exceptions of their own.
        except Exception as error:
            raise ValueError(
                f"Invalid model: {model!r} is no preset ({', '.join(PRESETS)}) and no config.json, and the hub gives "
                f"no configuration: {next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"Invalid model: {path} is no readable JSON configuration ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"Invalid model: {path} is no JSON object")
    try:
        return AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    except Exception as error:
        # Its checks differ between versions of transformers, and so do their exceptions.
        raise ValueError(f"Invalid model: {path}: {' '.join(str(error).split())[:300]}") from error


def _decoder(config: Any, model: str) -> PreTrainedConfig:
    """The configuration of a causal language model; of one that sees as well, its part for text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config.get_text_config(decoder=True)
    # Encoders with a head for generation have the switch is_decoder, which is off.
    encodes = config.model_type in _ENCODERS and not config.to_dict().get("is_decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or encodes:
        raise ValueError(
            f"Invalid model: {model} has the model_type {config.model_type!r}, expected a causal language model that "
            "transformers has code for, such as llama, qwen3, gemma3_text, mistral, phi, gpt2, opt, gpt_neox or mixtral"
        )
    config.use_cache = False
    return config


def build_model(
    config: PreTrainedConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A freshly initialised causal language model; on ``device="meta"`` it takes no memory.

    The weights are those of an fp32 model cast to ``dtype``, without room for an fp32 model; rotary frequencies stay
    fp32, as ``from_pretrained`` has them.

    Raises:
        ValueError: a configuration from which transformers cannot build the model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device), _NormalInFloat32():  # type: ignore[no-untyped-call]
            model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"Invalid model configuration: {type(error).__name__}: {error}") from error
    finally:
        torch.set_default_dtype(before)
    # Exported configurations name the dtype of the weights beside them.
    setattr(model.config, _dtype_word(config), dtype)
    return model


def pretrained_config(name: str) -> PreTrainedConfig:
    """The configuration of a model that comes with weights.

    Raises:
        ValueError: no folder with a configuration, and no hub name.
    """
    expected = f"Invalid init: {name!r}, expected a folder with config.json and weights, or a hub name"
    if name in PRESETS:
        raise ValueError(f"{expected}; a preset has no weights, see --model")
    try:
        return build_config(name)
    except ValueError as error:
        if (Path(name) / "config.json").is_file():
            raise ValueError(str(error).replace("Invalid model", "Invalid init", 1)) from error
        why = next(iter(str(error.__cause__ or "").splitlines()), "")
        raise ValueError(f"{expected} ({why})" if why else expected) from error


def load_pretrained(name: str, config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model on the CPU with the weights of a folder or of the hub, in ``dtype``.

    Raises:
        ValueError: no weights there, or weights of another shape than ``config`` has.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            name, config=config, output_loading_info=True, trust_remote_code=False, **{_dtype_word(config): dtype}
        )
    # The hub client, the readers of files and the model classes each have exceptions of their own.
    except Exception as error:
        raise ValueError(f"Invalid init: {name!r}: {' '.join(str(error).split())[:300]}") from error
    lacking = [*report["missing_keys"], *report.get("mismatched_keys", ())]
    if lacking:
        raise ValueError(
            f"Invalid init: {name!r} has no fitting weights for {len(lacking)} parameters, {lacking[0]} the first"
        )
    loaded: PreTrainedModel = model
    return loaded


def _dtype_word(config: Any) -> str:
    """What transformers calls the dtype of weights; it was another word before 4.56."""
    return "torch_dtype" if "torch_dtype" in vars(config) else "dtype"


def plain_head(model: Any) -> bool:
    """Whether logits are the product of the last hidden state and the head's weight, and can come in chunks."""
    head = model.get_output_embeddings()
    fields = model.config.to_dict()
    scaled = any(fields.get(key) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    return type(head) is torch.nn.Linear and head.bias is None and not scaled


def checkpoint_activations_(model: PreTrainedModel, *, every: int = 1) -> None:
    """Recompute the activations of every ``every``-th decoder layer in the backward pass.

    Raises:
        ValueError: a transformers that cannot leave layers out.
    """
    how = {"use_reentrant": False}
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=how, every_n_layers=every)
    elif every == 1:
        # Its name before transformers 5.23.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    else:
        raise ValueError(
            f"Invalid checkpoint_every: {every}, expected 1 with this version of transformers (5.23 has it)"
        )


class _NormalInFloat32(TorchFunctionMode):
    """Lets ``normal_`` fill bfloat16 tensors with rounded fp32 numbers; its own have 256 values for each uniform."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.nn.init.normal_, torch.Tensor.normal_):
            return func(*args, **(kwargs or {}))
        # torch.nn.init gives all arguments by name, and asks about the method within no more.
        kwargs = dict(kwargs or {})
        tensor, *rest = [kwargs.pop("tensor")] if "tensor" in kwargs else args
        if tensor.dtype == torch.bfloat16:
            tensor.detach().copy_(func(torch.empty_like(tensor, dtype=torch.float32), *rest, **kwargs))
        else:
            func(tensor, *rest, **kwargs)
        return tensor
