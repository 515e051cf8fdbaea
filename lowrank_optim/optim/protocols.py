"""The three parts of a method, as protocols, and the parts that compress nothing and only scale.

State of a parameter: plain tensors and ints under flat names.

    step            updates done; an int, or a 0-d float32 tensor where ``capturable``
    seed            the parameter's position over all groups: its source of randomness and of stagger
    left            whether the rows are the compressed axis (matrices only)
    basis, basis.k  orthonormal basis (d, rank) of the compressed axis; basis.k: of axis k of a tensor
    basis.codes     uint8, two 4-bit values a byte, with basis.scale and basis.zero instead of ``basis`` (Q-GaLore)
    indices         int64 (rank,), the columns that a basis of columns consists of
    refreshes       how many bases were drawn; with ``seed`` it determines a random basis that is not stored
    gap, overlaps   updates between two refreshes, and the shares of the last bases that the next ones kept (Q-GaLore)
    exp_avg         first moment, in the subspace
    exp_avg_sq      second moment, in the subspace, real
    indices         int64 (rank,), ascending: columns of a fixed basis, instead of ``basis``
    error           what the subspace has left of gradients, for error feedback; error.codes, error.scale: in int8
    momentum        of the whole matrix, in the coordinates of a fixed basis (Trion)
    exp_avg.codes   uint8 codes, and exp_avg.scale fp32 scales, instead of exp_avg where ``state_dtype="int8"``
                    stores it in blocks of 8 bits; exp_avg_sq likewise
    weight_correction  int8, what the bfloat16 weight lacks of 24 bits (``weight_rounding="compensated"``)
    update_norm     norm of the last update, 0-d, for the growth limiter (Fira, APOLLO)
    reset_step      the step after which the moments last were zero (FRUGAL)
    pending         (rows, rank) orthonormal, of a refresh in two phases that the next update ends (in_backward.py)
    exp_avg_sq_row, exp_avg_sq_col   its means over the columns and over the rows (Adafactor)
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from lowrank_optim.optim.checks import check_range
from lowrank_optim.optim.fused import Norms, Terms

State: TypeAlias = dict[str, Any]
Group: TypeAlias = dict[str, Any]


class Refresh(NamedTuple):
    """What became of a refresh.

    renewed: False where no basis could be computed and the old one stays.
    overlap: how the moments move into the new basis, None where they stay as they are: old_basisᴴ new_basis
        (rank, rank), or, for bases made of columns, int64 (rank,) with the old column of each new one, -1 for none.
    """

    renewed: bool
    overlap: Tensor | None = None


class Subspace(Protocol):
    """Where the gradient lives. Stateless: hyper-parameters are in the group, memory is in the state.

    One whose refresh can do with sums over micro-batches is a :class:`SummedSubspace` as well.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on hyper-parameters out of range."""

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        """Whether a parameter of this shape is compressed; else it gets the full-rank rule."""

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """Allocate the subspace's state, on the meta device too; the shape of the low-rank gradient."""

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """A view of a full-size tensor as the other methods expect it."""

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Renew the basis in place from an oriented, finite, non-zero gradient."""

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The low-rank gradient."""

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha * up(low), without an intermediate of target's size where possible."""


@runtime_checkable
class SummedSubspace(Protocol):
    """A subspace that is renewed from sums over micro-batches, each linear in the gradient, at the end of an update."""

    def sums(self, group: Group) -> bool:
        """Whether it does so with these hyper-parameters."""

    def sketch(self, grad: Tensor, state: State, group: Group) -> Tensor | None:
        """What a refresh sums beside ``down(grad)``; None where that suffices."""

    def refresh_from_sums(
        self, low: Tensor, sketch: Tensor | None, state: State, group: Group, *, dtype: torch.dtype
    ) -> Refresh:
        """Renew the basis in place, or begin to, from the sums of ``down`` and of ``sketch``, finite and not zero.

        ``dtype`` is that of the gradients, for what is kept.
        """


class Rule(Protocol):
    """Turns a gradient into a direction. Knows no learning rate, no decay and no parameter.

    A rule may also have ``update_(target, grad, state, group, *, alpha)``, which does target += alpha * direction(grad)
    in one pass; parameters that are not compressed then take it instead of ``direction``. One that looks at every
    element alone says ``elementwise = True``; large parameters that are not compressed are then updated in slices.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on hyper-parameters out of range."""

    def init(self, like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
        """Allocate the moments for low-rank gradients of ``shape``, with the dtype and device of ``like``."""

    def direction(self, low: Tensor, state: State, group: Group) -> Tensor:
        """The direction before bias correction; moments are updated in place."""

    def correction(self, step: int | Tensor, group: Group) -> float | Tensor:
        """Bias correction as a factor of the step size."""

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """Move the moments into a new basis in place; ``overlap`` as in :class:`Refresh`."""


class Lift(Protocol):
    """Turns a direction into an update of the whole weight.

    One whose update consists of :class:`Terms` returns them from ``terms(low, direction, basis, norms, state, group, *,
    alpha)``, and says with ``measures`` whether it takes :class:`Norms` or None; see ``fused.py``.
    A lift that never looks at the gradient has ``reads_gradient(group)``, which then is False; others need not have it.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on hyper-parameters out of range."""

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        """Allocate the lift's own state (a norm, an error)."""

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The oriented gradient that the step works on; error feedback adds the error, into a new tensor."""

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        """target += alpha * update; both are oriented, ``target`` may be of a wider dtype than ``grad``."""


class Identity:
    """The subspace of parameters that are not compressed: the gradient itself."""

    def validate(self, group: Group) -> None:
        pass

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        return False

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        return self.orient(param, state).shape

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        return Refresh(renewed=True)

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        return grad

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        if isinstance(alpha, Tensor):
            target.add_(low * alpha)
        else:
            target.add_(low, alpha=alpha)


class Plain:
    """Lift the direction and scale it: W += alpha * scale * up(N)."""

    measures = False

    def __init__(self, scale_key: str | None = "scale") -> None:
        self.scale_key = scale_key

    def validate(self, group: Group) -> None:
        if self.scale_key is not None:
            check_range(self.scale_key, group[self.scale_key], low=0.0)

    def init(self, param: Tensor, subspace: Subspace, state: State, group: Group) -> None:
        pass

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        return grad

    def reads_gradient(self, group: Group) -> bool:
        return False

    def apply_(
        self, target: Tensor, grad: Tensor, low: Tensor, direction: Tensor, subspace: Subspace,
        state: State, group: Group, *, alpha: float | Tensor,
    ) -> None:  # fmt: skip
        scale = 1.0 if self.scale_key is None else group[self.scale_key]
        subspace.add_up_(target, direction, state, group, alpha=alpha * scale)

    def terms(
        self, low: Tensor, direction: Tensor, basis: Tensor, norms: Norms | None, state: State, group: Group,
        *, alpha: float | Tensor,
    ) -> Terms:  # fmt: skip
        scale = 1.0 if self.scale_key is None else group[self.scale_key]
        return Terms(direction, alpha * scale)


IDENTITY = Identity()
UNSCALED = Plain(scale_key=None)
