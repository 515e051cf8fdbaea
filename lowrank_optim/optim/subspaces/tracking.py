"""A subspace that follows gradient and momentum in every step (LDAdam)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import normalize_, orthonormalize
from lowrank_optim.optim.options import number, one_of
from lowrank_optim.optim.parts import Group, Option, Refresh, State, Which
from lowrank_optim.optim.state_storage import load_moment
from lowrank_optim.optim.subspaces.oriented import SIDES, Stored, keep_where, on_left, overlap_where
from lowrank_optim.optim.subspaces.singular import top_basis, usable


def carried_momentum(group: Group) -> float:
    """How many times the momentum is in what error feedback hands on: beta1 / (1 - beta1), or 0 without it.

    (1 - beta1) A + beta1 M Pᵀ is the momentum of the whole matrix; its share outside of the new subspace, over
    1 - beta1, is the published generalized error A - P ĝ + beta1 / (1 - beta1) (P' M' - P M).
    """
    beta1: float = group["betas"][0]
    return beta1 / (1 - beta1) if group["error_feedback"] else 0.0


class Tracking(Stored):
    """The dominant subspace of a mean of momentum and gradient, one block power iteration a step."""

    splits = frozenset({"rows"})
    refreshes_rows = True
    options = {
        "rho": Option(number(0.0, 1.0), 0.908),
        "proj_type": Option(one_of(*SIDES), "std"),
        "proj_method": Option(one_of("power_iteration", "svd"), "power_iteration"),
    }

    def left(self, shape: tuple[int, ...], group: Group) -> bool:
        """As in GaLore, but "std" compresses the rows of a square matrix."""
        square = shape[-2] == shape[-1] and group["proj_type"] == "std"
        return square or on_left(shape, group["proj_type"])

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Turn the basis towards rho P M̂ᵀ + (1 - rho) A; the first is taken from A alone by an SVD."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        old = self.basis(grad, state, group)
        basis = None if which.warm is False else self._turned(grad, old, state, group, which)
        if not isinstance(which.warm, bool) and basis is not None:
            first = top_basis(grad, state["rank"], "svd", state, left=bool(state["left"]), which=which)
            basis = None if first is None else keep_where(which.warm, basis, first)
        if basis is None:
            basis = top_basis(grad, state["rank"], "svd", state, left=bool(state["left"]), which=which)
        if basis is None or not usable(basis, which):
            return Refresh(renewed=False)
        basis = keep_where(which.usable, basis, old)
        overlap = None if which.warm is False else overlap_where(which.usable, old.mH @ basis)
        state["basis"].copy_(basis)
        return Refresh(renewed=True, overlap=overlap)

    def _turned(self, grad: Tensor, old: Tensor, state: State, group: Group, which: Which) -> Tensor | None:
        # grad is A + carried M Pᴴ; in terms of it, the mean has this much of M Pᴴ.
        beta1, rho = group["betas"][0], group["rho"]
        share = rho / (1 - beta1 ** int(state["step"])) - (1 - rho) * carried_momentum(group)
        momentum = load_moment(state, "exp_avg", grad.dtype)
        if group["proj_method"] == "svd":
            mean = (1 - rho) * grad + share * (momentum @ old.mH)
            return top_basis(mean, state["rank"], "svd", state, left=bool(state["left"]), which=which)
        # B = share M Pᴴ + (1 - rho) A is never formed: B P and Bᴴ (B P) by their terms.
        image = share * momentum + (1 - rho) * (grad @ old)
        normalize_(image, which.sums)
        turned = (1 - rho) * (grad.mH @ image) + share * (old @ (momentum.mH @ image))
        return orthonormalize(turned if which.sums is None else which.sums.sum_(turned))
