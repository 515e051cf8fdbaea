"""LoRA factors of PEFT: trained alone, or beside a base that GaLore trains.

The factors are small and get the full-rank rule. ``--base`` thaws the matrices that they sit on as well, which take a
low-rank state, as large as that of factors of the same rank. Random tokens and a tiny LLaMA.

    python examples/peft_lora.py [--base]
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_optim import GaLoreAdamW, low_rank_groups


def build() -> PeftModel:
    """A LLaMA with factors of rank 4 on queries and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def train(model: PeftModel, *, base: bool, steps: int = 8) -> GaLoreAdamW:
    """Train in place; returns the optimizer."""
    if base:
        for name, param in model.named_parameters():
            param.requires_grad_(param.requires_grad or name.endswith("base_layer.weight"))
        groups = low_rank_groups(model, targets=r".*\.base_layer\.weight", rank=4, update_proj_gap=4)
    else:
        names, params = zip(*((name, param) for name, param in model.named_parameters() if param.requires_grad))
        groups = [{"params": params, "param_names": names, "rank": None}]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f} after {steps} updates")
    return optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="store_true", help="train the matrices below the factors too")
    optimizer = train(build(), base=parser.parse_args().base)
    for row in optimizer.explain()[:4]:
        print(row.name, row.shape, row.method, row.reason, sep="  ")
