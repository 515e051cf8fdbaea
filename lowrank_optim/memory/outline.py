"""The parameters of a LLaMA preset without its code, whose import takes as long as a plan."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_optim.pretrain.llama import Shape


class Outline(nn.Module):
    """The embeddings, one layer and the head of a preset on the meta device, named as transformers names them."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.intermediate

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        with torch.device("meta"):
            layer = {
                "self_attn": nn.ModuleDict({f"{name}_proj": linear(hidden, hidden) for name in "qkvo"}),
                "mlp": nn.ModuleDict(
                    {
                        "gate_proj": linear(hidden, inner),
                        "up_proj": linear(hidden, inner),
                        "down_proj": linear(inner, hidden),
                    }
                ),
                "input_layernorm": nn.RMSNorm(hidden),
                "post_attention_layernorm": nn.RMSNorm(hidden),
            }
            self.model = nn.ModuleDict(
                {
                    # Its own initialisation would compile what it draws.
                    "embed_tokens": nn.Embedding(shape.vocab, hidden, _weight=torch.empty(shape.vocab, hidden)),
                    "layers": nn.ModuleList([nn.ModuleDict(layer)]),
                    "norm": nn.RMSNorm(hidden),
                }
            )
            self.lm_head = linear(hidden, shape.vocab)
        self.to(dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.model["embed_tokens"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head
