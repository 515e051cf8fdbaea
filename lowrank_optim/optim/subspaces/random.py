"""Bases that do not look at the gradient: a function of the parameter's seed and of the count of refreshes."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import pick
from lowrank_optim.ops.gaussian import gaussian
from lowrank_optim.ops.orthonormal import orthonormalize
from lowrank_optim.ops.project import project
from lowrank_optim.ops.rounding import mix_key
from lowrank_optim.ops.sketch import sketch
from lowrank_optim.optim.options import one_of
from lowrank_optim.optim.parts import Group, Number, Option, Refresh, Scalar, Slot, Slots, State, View, Which
from lowrank_optim.optim.state_storage import SALTS
from lowrank_optim.optim.subspaces.oriented import SIDES, Oriented, Stored, on_left

MOMENTS = ("keep", "align", "rotate")


def overlap_of(old: Tensor, new: Tensor, moments: str) -> Tensor | None:
    """The matrix that moves coordinates in one basis into those of another; None where they stay.

    "rotate": the least-squares one, (oldᴴ old)⁻¹ oldᴴ new; "align": the sign that each column turned by.
    """
    if moments == "keep":
        return None
    wide = torch.promote_types(old.dtype, torch.float32)
    old, new = old.to(wide), new.to(wide)
    if moments == "align":
        turn = (old.conj() * new).sum(-2).sgn()
        return torch.where(turn == 0, torch.ones_like(turn), turn).diag_embed()
    return torch.linalg.solve(old.mH @ old, old.mH @ new)


def noise(shape: tuple[int, ...], like: Tensor, key: int | Tensor, group: Group, *, scale: float = 1.0) -> Tensor:
    """Independent real N(0, scale²) of ``shape`` in the precision of ``like``."""
    draw = pick(gaussian, group["backend"], like.device)
    *batch, rows, columns = shape
    dtype = like.dtype.to_real()
    return draw(rows, columns, key=key, dtype=dtype, device=like.device, batch=batch, scale=scale)


def sketch_matrix(shape: tuple[int, ...], like: Tensor, state: State, group: Group) -> Tensor:
    """Independent real N(0, 1) in the dtype of ``like``; the same for all micro-batches of an update."""
    key = mix_key(state["seed"], state["step"], SALTS["sketch"])
    return noise(shape, like, key, group).to(like.dtype)


def random_basis(like: Tensor, state: State, key: int | Tensor, group: Group) -> Tensor:
    """A uniformly random orthonormal basis as large as the present one, in fp32 or wider."""
    wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    # R's diagonal must be positive, or the distribution is not uniform.
    return orthonormalize(noise(tuple(state["basis"].shape), wide, key, group)).to(wide.dtype)


class Drawn(Oriented):
    """A basis that is drawn anew at every refresh; the state counts the draws in ``refreshes``."""

    follows_gradient = False
    refreshes_rows = True
    options = {
        "proj_type": Option(one_of(*SIDES), "std"),
        "moments": Option(one_of(*MOMENTS), "keep"),
    }

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        return on_left(shape, group["proj_type"])

    def slots(self, view: View, group: Group) -> Slots:
        # On the device where a CUDA graph replays the step: the kernel that draws reads it there.
        count = Slot((), torch.int64) if group["capturable"] else Number(0)
        return {**super().slots(view, group), "refreshes": count}

    def key(self, state: State) -> int | Tensor:
        """The key of the random numbers of the present refresh."""
        return mix_key(state["seed"], state["refreshes"], SALTS["basis"])


class Gaussian(Drawn):
    """A matrix of independent N(0, 1/rank), made anew wherever it is needed: nothing of it is stored.

    It is not orthonormal; projecting back is the inverse of projecting in expectation.
    """

    splits = frozenset({"rows", "columns"})

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """(..., d, rank) for an oriented gradient (..., rows, d), in its dtype."""
        rank = state["rank"]
        shape = (*like.shape[:-2], like.shape[-1], rank)
        return noise(shape, like, self.key(state), group, scale=rank**-0.5).to(like.dtype)

    def project_and_measure(self, grad: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor]:
        """One kernel draws and measures, but nothing of more than 32 bits."""
        operation = sketch if grad.dtype.itemsize > 4 else pick(sketch, group["backend"], grad.device)
        rank = state["rank"]
        basis, norms = operation(grad, rank, key=self.key(state), scale=rank**-0.5)
        return project(grad, basis), norms

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """The next matrix."""
        keeps = group["moments"] == "keep" or which.warm is False
        old = None if keeps else self.basis(grad, state, group)
        state["refreshes"] += 1
        if old is None:
            return Refresh(renewed=True)
        return Refresh(renewed=True, overlap=overlap_of(old, self.basis(grad, state, group), group["moments"]))


class RandomOrthonormal(Stored, Drawn):
    """A uniformly random orthonormal basis, drawn at every refresh."""

    by_columns = True
    orthonormal = True
    splits = frozenset({"rows", "columns"})

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """The next basis."""
        state["refreshes"] += 1
        basis: Tensor = state["basis"]
        new = random_basis(grad, state, self.key(state), group).to(basis.dtype)
        overlap = None if which.warm is False else overlap_of(basis, new, group["moments"])
        basis.copy_(new)
        return Refresh(renewed=True, overlap=overlap)


class RandomColumns(Drawn):
    """Coordinates of the compressed side, drawn without replacement at every refresh."""

    factored = False
    orthonormal = True
    splits = frozenset({"rows"})

    def slots(self, view: View, group: Group) -> Slots:
        indices = Slot((*view.batch, self.rank(view.shape, group)), torch.int64)
        return {**super().slots(view, group), "indices": indices}

    def sees_all(self, group: Group) -> bool:
        """No: a selection looks at the selected columns only."""
        return False

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """The next coordinates, ascending; moments other than "keep" follow the coordinates that stay."""
        state["refreshes"] += 1
        old: Tensor = state["indices"].clone()
        d = grad.shape[-1]
        like = grad.new_empty(0, dtype=torch.float32)
        score = noise((*grad.shape[:-2], d, 1), like, self.key(state), group).squeeze(-1)
        new = score.topk(old.shape[-1]).indices.sort().values
        state["indices"].copy_(new)
        if group["moments"] == "keep" or which.warm is False:
            return Refresh(renewed=True)
        return Refresh(renewed=True, overlap=predecessors(old, new, d))

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(..., rows, rank), a gather."""
        return pick_columns(grad, state["indices"])

    def project_back_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """Add to the selected columns only."""
        add_to_columns_(target, state["indices"], low, alpha)


def predecessors(old: Tensor, new: Tensor, d: int) -> Tensor:
    """Where each of the columns ``new`` (..., rank) stood among ``old``, -1 for none.

    Args:
        old, new: int64 (..., rank), column numbers below d.
    """
    place = torch.full((*old.shape[:-1], d), -1, dtype=torch.int64, device=old.device)
    place.scatter_(-1, old, torch.arange(old.shape[-1], device=old.device).expand(old.shape))
    return place.gather(-1, new)


def pick_columns(matrix: Tensor, indices: Tensor) -> Tensor:
    """Columns ``indices`` (..., rank) of (..., rows, d), in fp32 or wider."""
    if indices.ndim == 1:
        picked = matrix.index_select(-1, indices)
    else:
        picked = matrix.gather(-1, indices.unsqueeze(-2).expand(*matrix.shape[:-1], indices.shape[-1]))
    return picked.to(torch.promote_types(matrix.dtype, torch.float32))


def add_to_columns_(target: Tensor, indices: Tensor, low: Tensor, alpha: Scalar) -> None:
    """target[..., indices] += alpha * low."""
    if isinstance(alpha, Tensor):
        low, alpha = low * alpha, 1.0
    low = low.to(target.dtype)
    if indices.ndim == 1:
        target.index_add_(-1, indices, low, alpha=alpha)
    else:
        target.scatter_add_(-1, indices.unsqueeze(-2).expand(low.shape), low * alpha)
