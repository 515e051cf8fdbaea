"""SCALE: gradients normalised row by row, and momentum for the output head alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.chunks import column_norms
from lowrank_optim.ops.row_norms import row_norms
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.options import Common, arguments, number, one_of
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.state_storage import load_moment, moment_slots, replace_moment_
from lowrank_optim.optim.subspaces.whole import Unchanged, Whole
from lowrank_optim.optim.two_rates import TwoRates

# The published guard of the root of a mean square.
GUARD = 1e-8


class RowNormalised(Lift):
    """Every row divided by the root of its mean square."""

    def update(self, step: Step, state: State, group: Group) -> Update:
        size = row_norms(step.grad) / step.grad.shape[-1] ** 0.5
        return Update(row_scale=zero_unless(step.ok, size.clamp_min_(GUARD).reciprocal_()))


class ColumnNormalised(Lift):
    """Every column divided by the root of its mean square."""

    def update(self, step: Step, state: State, group: Group) -> Update:
        square = column_norms(step.grad, 2).unsqueeze(-2) / step.grad.shape[-2]
        return Update(column_scale=zero_unless(step.ok, square.sqrt_().clamp_min_(GUARD).reciprocal_()))


class RowNormalisedMomentum(RowNormalised):
    """The rows of a mean of gradients; the mean, in ``momentum``, is the only state of a matrix."""

    changes_gradient = True
    options = {"beta": Option(number(0.0, 1.0, high_open=True), 0.9)}

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        return moment_slots("momentum", shape, view.wide, group["state_dtype"], "elements")

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        mean = load_moment(state, "momentum", grad.dtype)
        return mean.lerp(grad.to(mean.dtype), 1 - group["beta"])

    def after(self, step: Step, state: State, group: Group) -> None:
        replace_moment_(state, "momentum", step.grad, step.ok)


HIDDEN, EMBEDDING, HEAD = (
    Parts(Whole(), Unchanged(), lift) for lift in (RowNormalised(), ColumnNormalised(), RowNormalisedMomentum())
)


class SCALE(TwoRates):
    """Normalised gradients without state for matrices, momentum for the head, Adam for vectors.

    For a weight W (m, n) = (out, in) with gradient G::

        U_ij = G_ij / max(rms_j(G_ij), 1e-8)           # hidden matrices: by row, an output unit
        U_ij = G_ij / max(rms_i(G_ij), 1e-8)           # embedding (tokens, width): by column, over the tokens
        M = beta M + (1 - beta) G                      # head (tokens, width): by row, with M in the place of G
        W = (1 - lr weight_decay) W
        W = W - lr U

    Embedding and head are known by name in ``model.named_parameters()`` and by the module in
    :func:`low_rank_groups`; in a group without roles all matrices are hidden ones, or with ``rank=None`` get Adam.
    Vectors, and what else is no hidden matrix, get Adam, with a learning rate of its own, which stays at the ratio
    adamw_lr / lr of the group's ``lr``.

    Args:
        params: ``model.named_parameters()``, :func:`low_rank_groups`, tensors (all matrices are hidden), or groups.
        lr: learning rate of matrices, a number >= 0 or a one-element tensor.
        betas: decay of Adam's two moments, each in [0, 1).
        eps: Adam's, beside the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        beta: decay of the head's momentum, in [0, 1).
        embedding: "columns" as above, or "head": the embedding gets the head's rule, for models in which the two are
            one parameter.
        adamw_lr: learning rate of Adam while ``lr`` has its initial value; None is ``lr``.
        common: stagger (without effect), state_dtype, weight_rounding, maximize, capturable, backend; see
            :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Glentis et al. 2025 (arXiv 2506.16659). As in the authors' code, by the root mean square; the paper divides
    by the 2-norm, which makes U sqrt(n) (embedding: sqrt(m)) times smaller for the same lr. What the paper calls a
    column is a row of a torch weight. Adam's betas and eps could not be established.

    Deviations: a tied embedding counts as an embedding or, with ``embedding="head"``, as a head; in the published code
    it loses the momentum. Norms are fp32. Experts are a batch of matrices, convolutions matrices (out, in * kernel).
    """

    triple = HIDDEN
    others = (EMBEDDING.lift, HEAD.lift)
    full_rank = Adam()
    options = {**TwoRates.options, "embedding": Option(one_of("columns", "head"), "columns")}
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta: float = 0.9,
        embedding: str = "columns",
        adamw_lr: float | Tensor | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"rank": 1, **arguments(locals())})

    def _view_and_parts(self, param: Tensor, group: Group) -> tuple[View, Parts]:
        """Embedding and head have rules of their own, whatever the rank of their group."""
        view, parts = super()._view_and_parts(param, group)
        role = self._role(param, group)
        if role not in ("embedding", "head") or view.kind != "matrix":
            return view, parts
        return view, HEAD if role == "head" or group["embedding"] == "head" else EMBEDDING
