"""LLaMA by preset name or from a Hugging Face ``config.json``; the model itself is transformers' own."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel


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


def build_config(model: str, *, vocab_size: int | None = None) -> LlamaConfig:
    """The LlamaConfig of a preset name, a ``config.json``, or a folder that holds one.

    Args:
        model: a key of :data:`PRESETS` or a path.
        vocab_size: replaces the configuration's own vocabulary size.

    Raises:
        ValueError: neither a preset nor a readable LLaMA configuration.
        RuntimeError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig
    except ImportError as error:
        raise RuntimeError("LLaMA models need transformers: pip install 'lowrank-optim[train]'") from error
    if model in PRESETS:
        shape = PRESETS[model]
        config = LlamaConfig(
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
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            near = difflib.get_close_matches(model, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"Invalid model: {model!r}, expected a preset ({', '.join(PRESETS)}) or a config.json{hint}"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"Invalid model: {path} is no readable JSON configuration ({error})") from error
        if not isinstance(fields, dict) or fields.get("model_type", "llama") != "llama":
            raise ValueError(f"Invalid model: {path} describes no LLaMA model (model_type must be 'llama')")
        try:
            config = LlamaConfig(**fields)
        except Exception as error:
            # Its checks differ between versions of transformers, and so do their exceptions.
            raise ValueError(f"Invalid model: {path}: {' '.join(str(error).split())}") from error
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return config


def build_model(
    config: LlamaConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A freshly initialised ``LlamaForCausalLM``; on ``device="meta"`` it takes no memory.

    The weights are those of an fp32 model cast to ``dtype``, without room for an fp32 model; rotary frequencies stay
    fp32, as ``from_pretrained`` has them.

    Raises:
        ValueError: a configuration from which transformers cannot build the model.
    """
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device), _NormalInFloat32():  # type: ignore[no-untyped-call]
            model: PreTrainedModel = LlamaForCausalLM(config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"Invalid model configuration: {type(error).__name__}: {error}") from error
    finally:
        torch.set_default_dtype(before)
    return model


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
        if func is torch.Tensor.normal_ and args[0].dtype == torch.bfloat16:
            values = torch.empty_like(args[0], dtype=torch.float32)
            return args[0].copy_(func(values, *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))
