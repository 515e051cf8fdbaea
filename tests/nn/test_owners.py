"""Layers whose weight is read by the code around them: they stay as they are, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_optim.nn import LowRank, convert

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
SWITCH = {**SMALL, "num_decoder_layers": 2, "num_experts": 2}
MAMBA = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2}


def t5() -> Any:
    config = transformers.T5Config(**SMALL, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(config)


def switch() -> Any:
    config = transformers.SwitchTransformersConfig(**SWITCH, decoder_start_token_id=0)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA))


@pytest.mark.parametrize("build", [t5, switch, mamba])
def test_what_is_converted_runs(build: Any) -> None:
    model = build()
    names = convert(model, LowRank(rank=2))
    assert names
    ids = torch.randint(2, 50, (1, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in names:
        for factor in model.get_submodule(name).parameters():
            # A token choice may leave an expert out.
            assert factor.grad is None or factor.grad.isfinite().all()


def test_a_target_that_names_such_a_layer_is_refused() -> None:
    model = t5()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"DenseReluDense.wo', whose weight T5DenseGatedActDense reads"):
        convert(model, LowRank(rank=2), targets="wo")
    assert {name: type(module) for name, module in model.named_modules()} == before
