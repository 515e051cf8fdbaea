"""Bases that do not look at the gradient: a function of the parameter's position and the count of refreshes."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.orthonormal import orthonormalize
from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.optim.galore import TopSingular
from lowrank_optim.optim.protocols import Group, Refresh, State

# Sets these random bits apart from those that round moments and weights.
SALT = 5


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


def count_refreshes(param: Tensor, state: State, group: Group) -> None:
    """Allocate ``refreshes``, which with ``seed`` determines the present basis; on the device where capturable."""
    count = torch.zeros((), dtype=torch.int64, device=param.device)
    state["refreshes"] = count if group["capturable"] else 0


def noise(d: int, rank: int, dtype: torch.dtype, device: torch.device, state: State, group: Group) -> Tensor:
    """Independent real N(0, 1), (d, rank), for the present refresh."""
    draw = pick(gaussian, group["backend"], device)
    key = mix_key(state["seed"], state["refreshes"], SALT)
    return draw(d, rank, key=key, dtype=dtype.to_real(), device=device)


class Gaussian(TopSingular):
    """A matrix of independent N(0, 1/rank), made anew wherever it is needed: nothing of it is stored.

    It is not orthonormal; ``add_up_`` is the inverse of ``down`` in expectation.
    """

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left`` and ``refreshes``."""
        shape = super().init(param, state, group)
        del state["basis"]
        count_refreshes(param, state, group)
        return shape

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """(d, rank) for an oriented gradient (rows, d), in its dtype."""
        rank = group["rank"]
        return noise(like.shape[-1], rank, like.dtype, like.device, state, group).mul_(rank**-0.5).to(like.dtype)

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """The next matrix."""
        old = self.basis(grad, state, group) if group["moments"] != "keep" else None
        state["refreshes"] += 1
        if old is None:
            return Refresh(renewed=True)
        return Refresh(renewed=True, overlap=overlap_of(old, self.basis(grad, state, group), group["moments"]))


class RandomOrthonormal(TopSingular):
    """A uniformly random orthonormal basis, drawn at every refresh."""

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left``, ``basis`` and ``refreshes``."""
        shape = super().init(param, state, group)
        count_refreshes(param, state, group)
        return shape

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """The next basis."""
        state["refreshes"] += 1
        basis = state["basis"]
        d, rank = basis.shape
        sketch = noise(d, rank, torch.promote_types(grad.dtype, torch.float32), grad.device, state, group)
        # R's diagonal must be positive, or the distribution is not uniform.
        new = orthonormalize(sketch).to(basis.dtype)
        overlap = overlap_of(basis, new, group["moments"]) if int(state["step"]) > 0 else None
        basis.copy_(new)
        return Refresh(renewed=True, overlap=overlap)


class RandomColumns(TopSingular):
    """Coordinates of the compressed side, drawn without replacement at every refresh."""

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left``, ``indices`` (rank,) and ``refreshes``."""
        shape = super().init(param, state, group)
        del state["basis"]
        state["indices"] = torch.zeros(group["rank"], dtype=torch.int64, device=param.device)
        count_refreshes(param, state, group)
        return shape

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """The next coordinates, ascending; moments other than "keep" follow the coordinates that stay."""
        state["refreshes"] += 1
        old = state["indices"].clone()
        d = grad.shape[-1]
        score = noise(d, 1, torch.float32, grad.device, state, group).view(-1)
        new = score.topk(old.shape[0]).indices.sort().values
        state["indices"].copy_(new)
        if group["moments"] == "keep" or int(state["step"]) == 0:
            return Refresh(renewed=True)
        place = torch.full((d,), -1, dtype=torch.int64, device=grad.device)
        place[old] = torch.arange(old.shape[0], device=grad.device)
        return Refresh(renewed=True, overlap=place[new])

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank); non-finite throughout where the gradient is so anywhere."""
        # A projection looks at every entry, a selection does not, and the base judges a gradient by its low-rank image.
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad.index_select(-1, state["indices"]) + (0 * grad.sum(dtype=wide)).to(grad.dtype)

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """Add to the selected columns only."""
        target.index_add_(-1, state["indices"], (low * alpha).to(target.dtype))
