"""How much of each gradient its subspace holds."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.in_backward import vector_norm
from lowrank_optim.optim.subspaces.random import Gaussian
from lowrank_optim.optim.subspaces.whole import Unprojected
from lowrank_optim.optim.views import as_matrices, is_sharded
from lowrank_optim.pretrain.run_page import ENERGY


@torch.no_grad()
def captured_energy(optimizer: Optimizer) -> dict[str, float]:
    """|G P|² / |G|² of every compressed parameter that has a gradient and a basis, under ``energy/<name>``.

    For orthonormal bases only: a Gaussian projection has as much energy as the gradient, whatever it loses.
    """
    found: dict[str, float] = {}
    if not isinstance(optimizer, LowRankOptimizer):
        return found
    for group in optimizer.param_groups:
        for p in group["params"]:
            # Of a sharded gradient no process has the whole.
            if p.grad is None or p not in optimizer.state or is_sharded(p) or not p.grad.isfinite().all():
                continue
            plan = optimizer.plan_of(p, group)
            subspace = plan.parts.subspace
            if subspace is None or isinstance(subspace, (Gaussian, Unprojected)) or not subspace.factored:
                continue
            grad = subspace.orient(as_matrices(p.grad, plan.view), plan.state)
            low = grad @ subspace.basis(grad, plan.state, group)
            whole = float(vector_norm(grad)) ** 2
            name = optimizer.entry(p).name or f"parameter {optimizer.entry(p).place}"
            if whole > 0:
                found[f"{ENERGY}{name}"] = float(vector_norm(low)) ** 2 / whole
    return found
