"""Every parameterization under a low-rank optimizer, in bf16 and under gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lowrank_optim import GaLoreAdamW
from lowrank_optim.nn import convert
from tests.nn.parameterizations import VARIANTS, block, train

every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_trains_with_galore(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = GaLoreAdamW(trained, lr=1e-2, rank=2, update_proj_gap=10, scale=1.0)
    # The factors, whose smaller side is their rank 4, and no vector.
    compressed = [row.name for row in optimizer.explain() if row.method == "rank 2"]
    assert {"attn.q_proj.A", "attn.q_proj.B"} <= set(compressed)
    assert all(model.get_parameter(n).ndim == 2 for n in compressed)
    losses = train(model, optimizer, 0, 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@every_variant
def test_integer_buffers_keep_their_dtype_in_bf16(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    before = {key: value.dtype for key, value in model.state_dict().items() if not value.is_floating_point()}
    model.to(torch.bfloat16)
    after = {key: value.dtype for key, value in model.state_dict().items() if not value.is_floating_point()}
    assert after == before
    assert torch.int64 not in after.values()
    first, *_, last = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0, 30)
    assert last < first


@every_variant
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    layer = VARIANTS[name].options.build(24, 37, bias=True)
    x = torch.randn(5, 24, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    direct = torch.autograd.grad(layer(x).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
