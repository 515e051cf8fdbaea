from __future__ import annotations

import torch

from lowrank_optim.pretrain.energy import captured_energy
from tests.conformance import every_variant
from tests.optimizers import build


@every_variant
def test_no_basis_holds_more_than_the_gradient(name: str, kwargs: dict[str, object]) -> None:
    weight = torch.nn.Parameter(torch.randn(12, 16))
    optimizer = build(name, [("weight", weight)], **kwargs)
    weight.grad = torch.randn(12, 16)
    optimizer.step()
    assert all(0 < share <= 1 + 1e-2 for share in captured_energy(optimizer).values())
