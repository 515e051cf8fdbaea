"""A sample of what a model has learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank_optim.pretrain.config import user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int, seed: int) -> str:
    """``prompt`` and up to ``tokens`` sampled ones (temperature 0.8, the 50 likeliest), the same for a seed.

    Raises:
        UserError: the model predicts no probabilities, as after a divergence.
    """
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        # What begins is a text, as after the end of another one.
        ids = torch.tensor([[tokenizer.eos_token_id or 0]], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices), torch.no_grad(), user_errors():
        torch.manual_seed(seed)
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return str(tokenizer.decode(rows[0], skip_special_tokens=True))
