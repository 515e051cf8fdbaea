"""A loop of one's own with Accelerate: accumulation, clipping, and a saved state from which the bits are the same.

Random tokens and a tiny LLaMA. Updates within the backward pass (``lowrank_optim.step_in_backward``) would take the
place of ``accelerator.accumulate``, clipping and ``optimizer.step``, and of nothing else.

    accelerate launch examples/accelerate_loop.py [8] [--save DIR] [--load DIR --first 4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_optim import GaLoreAdamW, low_rank_groups


def train(updates: int = 8, *, first: int = 0, save: Path | None = None, load: Path | None = None) -> LlamaForCausalLM:
    """Updates ``first`` to ``updates``, two micro-batches each; from and to the folders of a state."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    optimizer = GaLoreAdamW(low_rank_groups(model, rank=8, update_proj_gap=3), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 4))
    loader = DataLoader(torch.randint(128, (64, 16)), batch_size=4)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if load:
        accelerator.load_state(load)
        loader = skip_first_batches(loader, 2 * first)
    for _, batch in zip(range(2 * first, 2 * updates), loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                accelerator.print(f"loss {loss.item():.3f}  gradient norm {norm.item():.3f}")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if save:
        accelerator.save_state(save)
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("updates", type=int, nargs="?", default=8)
    parser.add_argument("--first", type=int, default=0, help="updates that the state of --load has made")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    train(**vars(parser.parse_args()))
