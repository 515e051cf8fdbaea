"""GaLoreAdamW8bit against bitsandbytes' own 8-bit Adam, and against GaLoreAdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit


def test_it_is_galore_with_int8_moments() -> None:
    p, q = (nn.Parameter(torch.ones(300, 40)) for _ in range(2))
    ours = GaLoreAdamW8bit([p], rank=20)
    other = GaLoreAdamW([q], rank=20, eps=1e-8, weight_decay=1e-2, state_dtype="int8")
    for _ in range(3):
        p.grad = q.grad = torch.randn(300, 40)
        ours.step()
        other.step()
    assert torch.equal(p, q)
    assert ours.state[p]["exp_avg.codes"].dtype == torch.uint8


def test_the_full_rank_rule_follows_bitsandbytes() -> None:
    """With eps = 0 and no decay both formulas are the same.

    Compared one step at a time from the same state: bitsandbytes' compiled CPU quantizer looks codes up in a coarse
    table, which is off by up to 7 codes, whereas ours, its portable backend and its CUDA kernel take the nearest.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional")
    p, q = (nn.Parameter(torch.ones(80, 64)) for _ in range(2))
    ours = GaLoreAdamW8bit([p], lr=0.01, eps=0.0, weight_decay=0.0, rank=None)
    theirs = bitsandbytes.optim.Adam8bit([q], lr=0.01, eps=0.0, weight_decay=0.0)
    for _ in range(5):
        p.grad = q.grad = torch.randn(80, 64)
        ours.step()
        theirs.step()
        state, other = ours.state[p], theirs.state[q]
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["exp_avg.scale"], other["absmax1"], rtol=1e-6, atol=0)
        torch.testing.assert_close(state["exp_avg_sq.scale"], other["absmax2"], rtol=1e-6, atol=0)
        assert torch.equal(other["qmap1"], functional.create_dynamic_map(signed=True))
        # Continue from one state: the codes are the same format.
        other["state1"].copy_(state["exp_avg.codes"])
        other["state2"].copy_(state["exp_avg_sq.codes"])
        other["absmax1"].copy_(state["exp_avg.scale"])
        other["absmax2"].copy_(state["exp_avg_sq.scale"])
        q.data.copy_(p.data)
