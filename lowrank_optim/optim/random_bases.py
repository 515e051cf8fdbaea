"""Bases that do not look at the gradient: a function of the parameter's position and the count of refreshes."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.optim.base import Group, Refresh, State
from lowrank_optim.optim.galore import TopSingular


def overlap_of(old: Tensor, new: Tensor, moments: str) -> Tensor | None:
    """The matrix that moves coordinates in one basis into those of another; None where they stay.

    "rotate": the least-squares one, (oldᴴ old)⁻¹ oldᴴ new; "align": the sign that each column turned by.
    """
    if moments == "keep":
        return None
    wide = torch.promote_types(old.dtype, torch.float32)
    old, new = old.to(wide), new.to(wide)
    if moments == "align":
        turn = (old.conj() * new).sum(0).sgn()
        return torch.where(turn == 0, torch.ones_like(turn), turn).diag()
    return torch.linalg.solve(old.mH @ old, old.mH @ new)


class Gaussian(TopSingular):
    """A matrix of independent N(0, 1/rank), made anew wherever it is needed: nothing of it is stored."""

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left`` and ``refreshes``, the number of the present matrix."""
        shape = super().init(param, state, group)
        del state["basis"]
        count = torch.zeros((), dtype=torch.int64, device=param.device)
        state["refreshes"] = count if group["capturable"] else 0
        return shape

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """(d, rank) for an oriented gradient (rows, d), in its dtype."""
        draw = pick(gaussian, group["backend"], like.device)
        real = like.dtype.to_real()
        d, rank = like.shape[-1], group["rank"]
        matrix = draw(d, rank, seed=state["seed"], draw=state["refreshes"], dtype=real, device=like.device)
        return matrix.mul_(rank**-0.5).to(like.dtype)

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """The next matrix."""
        old = self.basis(grad, state, group) if group["moments"] != "keep" else None
        state["refreshes"] += 1
        if old is None:
            return Refresh(renewed=True)
        return Refresh(renewed=True, overlap=overlap_of(old, self.basis(grad, state, group), group["moments"]))

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        return grad @ self.basis(grad, state, group)

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha low Pᴴ; in expectation the inverse of :meth:`down`."""
        target.addmm_((low * alpha).to(target.dtype), self.basis(target, state, group).mH)
