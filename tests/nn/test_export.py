"""A converted LLaMA that trains, merges, and leaves for a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_optim.nn import convert, merge
from tests.nn.parameterizations import VARIANTS

MERGEABLE = [name for name, variant in VARIANTS.items() if getattr(variant.options, "act", "none") == "none"]


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_llama_is_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    assert len(convert(model, VARIANTS[name].options)) == 14
    optimizer = VARIANTS[name].optimizer(model)
    for seed in range(5):
        ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    before = model(ids).logits
    merge(model).save_pretrained(tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(loaded(ids).logits, before, rtol=0, atol=1e-4)
