"""The vocabulary of a method: a Subspace, a Rule and a Lift, the state that they declare and the Update that they make.

Parts are stateless: hyper-parameters stand in the parameter group, memory in the parameter's state. Every part declares
the options that it reads and, in ``slots``, every tensor and number that it keeps. Capabilities are class attributes;
a part that does not set one does not have it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import Sums
from lowrank_optim.ops.row_norms import row_norms

State: TypeAlias = dict[str, Any]
Group: TypeAlias = dict[str, Any]
Scalar: TypeAlias = float | Tensor

REQUIRED: Any = object()


class Option(NamedTuple):
    """One option of a group: ``check(name, value)`` raises ValueError; without a default it is required."""

    check: Callable[[str, Any], None]
    default: Any = REQUIRED


class Slot(NamedTuple):
    """One tensor of a parameter's state.

    along: the axis of the weight, "rows" or "columns", that the first axis of the tensor after those of a batch runs
        along; "elements" where it has the layout of the weight; None where it runs along neither.
    fill: what a new tensor holds.
    std: of normal numbers that are added to it, a function of the parameter's seed.
    by_columns: whether a CPU keeps it column after column, in which order BLAS packs a basis fastest.
    late: whether it may be absent from the state, which then stands for a tensor of zeros that nothing uses.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    along: str | None = None
    fill: float = 0.0
    late: bool = False
    std: float = 0.0
    by_columns: bool = False


class Number(NamedTuple):
    """One int of a parameter's state. A ``fixed`` one never changes: another value means another state."""

    initial: int
    fixed: bool = False


Slots: TypeAlias = dict[str, Slot | Number]


class View(NamedTuple):
    """What a method sees of a parameter.

    shape: of a matrix (m, n), of a batch of matrices (..., m, n), or of the parameter itself.
    kind: "matrix", "stack" (a batch of matrices), "convolution" or "vector".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str

    @property
    def wide(self) -> torch.dtype:
        """The dtype of arithmetic: fp32, or wider where the parameter is."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes of a batch of matrices."""
        return self.shape[:-2] if self.kind == "stack" else ()

    @property
    def matrices(self) -> int:
        """The number of matrices."""
        return math.prod(self.batch)

    def as_matrix(self) -> View:
        """A convolution (out, in, ...) as a matrix (out, in * kernel)."""
        if self.kind != "convolution":
            return self
        return self._replace(shape=(self.shape[0], math.prod(self.shape[1:])))


class Update(NamedTuple):
    """How an oriented weight moves: W <- decay W + size (scale project_back(low) + row_scale ∘ G ∘ column_scale).

    low: (..., rows, rank), or None for nothing to project back.
    row_scale, column_scale: (..., rows, 1) or (..., 1, 1), and (..., 1, columns); no gradient term where both are None.
    full: takes the place of G where a method makes a full-size matrix anyway.
    """

    low: Tensor | None = None
    scale: Scalar = 1.0
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    full: Tensor | None = None


class Norms(NamedTuple):
    """Norms of every row of the low-rank gradient and its direction, (2, ..., rows), and of the gradient.

    Those of the gradient, (..., rows, 1), are not finite where it is not.
    """

    low: Tensor
    grad: Tensor


class Which(NamedTuple):
    """The matrices of a batch that a refresh is about.

    usable: bool (..., 1, 1), those to renew; None for all.
    warm: whether there is a basis already: True, False, or bool (..., 1, 1).
    sums: where the gradient is some rows of the whole.
    """

    usable: Tensor | None = None
    warm: bool | Tensor = True
    sums: Sums | None = None


class Refresh(NamedTuple):
    """Result of a refresh.

    renewed: False where no basis could be computed and the old one stays; or bool (..., 1, 1) on the device, one a
        matrix.
    overlap: how the moments move into the new basis, None where they stay as they are: old_basisᴴ new_basis
        (..., rank, rank), or, for bases made of columns, int64 (..., rank) with the old column of each new one, -1 for
        none.
    """

    renewed: bool | Tensor
    overlap: Tensor | None = None


class Accumulation(ABC):
    """How a subspace is renewed from sums over micro-batches, each linear in the gradient, at the end of an update."""

    @abstractmethod
    def works(self, group: Group) -> bool:
        """Whether sums suffice with these hyper-parameters."""

    def slots(self, subspace: Any, view: View, group: Group) -> Slots:
        """What a refresh keeps from one update to the next."""
        return {}

    @abstractmethod
    def sketch(self, subspace: Any, grad: Tensor, state: State, group: Group) -> Tensor | None:
        """What a refresh sums beside the projection; None where that suffices."""

    @abstractmethod
    def refresh(
        self, subspace: Any, low: Tensor, sketch: Tensor | None, state: State, group: Group, which: Which,
        dtype: torch.dtype,
    ) -> Refresh:  # fmt: skip
        """Renew the basis in place, or begin to, from the sums of projections and sketches, finite and not zero.

        ``dtype`` is that of the gradients, for what is kept.
        """


class Part:
    """What subspaces, rules and lifts have in common."""

    options: ClassVar[Mapping[str, Option]] = {}

    def check(self, group: Group) -> None:
        """Raise ValueError on options that are right alone and wrong together."""


class Subspace(Part):
    """Where the gradient lives. Works on oriented tensors (..., rows, d), whose last axis is compressed."""

    # Convolutions are seen as matrices (out, in * kernel); False: as they are.
    flattens: ClassVar[bool] = True
    # Whether `basis` exists, so that a product projects back; else `project_back_` alone does.
    factored: ClassVar[bool] = True
    # Whether there is a basis to be renewed at all.
    refreshes: ClassVar[bool] = True
    # Whether the basis comes from the gradient, so that a zero gradient gives none.
    follows_gradient: ClassVar[bool] = True
    # Whether the basis has orthonormal columns, so that a gradient which is projected back has the same projection.
    orthonormal: ClassVar[bool] = False
    # How a refresh is made from sums over micro-batches; None: it takes a whole gradient.
    accumulation: ClassVar[Accumulation | None] = None
    # Along which axes of an oriented gradient, "rows" or "columns", it may be split over processes for a projection.
    splits: ClassVar[frozenset[str]] = frozenset()
    # Whether a refresh can do with the rows of one process and sums over all; else it gets all rows.
    refreshes_rows: ClassVar[bool] = False

    def compresses(self, shape: tuple[int, ...], group: Group) -> bool:
        """Whether a parameter of this view is compressed; else it gets the full-rank rule."""
        raise NotImplementedError

    def rank(self, shape: tuple[int, ...], group: Group) -> int:
        """The rank that the group gives a parameter of this view."""
        rank: int = group["rank"]
        return rank

    def describe(self, shape: tuple[int, ...], group: Group) -> str:
        """What a parameter of this view gets, in the words of ``explain``."""
        return f"rank {self.rank(shape, group)}"

    def slots(self, view: View, group: Group) -> Slots:
        """What it keeps."""
        raise NotImplementedError

    def low_shape(self, view: View, group: Group) -> tuple[int, ...]:
        """The shape of the low-rank gradient."""
        raise NotImplementedError

    def oriented_shape(self, view: View, group: Group) -> tuple[int, ...]:
        """The shape of an oriented gradient."""
        return view.shape

    def kept_axis(self, view: View, group: Group) -> str | None:
        """The axis of the weight that the rows of an oriented gradient run along."""
        return None

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """A view of a tensor of the parameter's view shape as the other methods expect it."""
        raise NotImplementedError

    def sees_all(self, group: Group) -> bool:
        """Whether one non-finite entry of a gradient always makes its projection non-finite."""
        return True

    def makes_basis(self, group: Group) -> bool:
        """Whether `basis` computes at every call and projecting is the product with it, so that a step asks once."""
        return False

    def refresh(self, grad: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Renew the basis in place from a finite gradient; that of usable matrices is not zero."""
        raise NotImplementedError

    def project(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The low-rank gradient, in fp32 or wider."""
        raise NotImplementedError

    def project_and_measure(self, grad: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor]:
        """The low-rank gradient, and the norms of the rows of the gradient, (..., rows, 1)."""
        return self.project(grad, state, group), row_norms(grad)

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """The (..., d, rank) basis in the dtype of ``like``."""
        raise NotImplementedError

    def project_back_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """target += alpha * project_back(low)."""
        raise NotImplementedError


class Rule(Part):
    """Turns a gradient into a direction. Knows no learning rate, no decay and no parameter."""

    # Whether every element is treated for itself, so that large parameters can be updated in slices.
    elementwise: ClassVar[bool] = False
    # Whether `direction` also takes ``ok``, the verdict on the gradient, which then need not be masked, ``dtype``, that
    # of its result, and ``spent``, whether it may overwrite the gradient.
    masks: ClassVar[bool] = False
    # Whether every row is treated for itself; else a process gets all rows of a low-rank gradient.
    rowwise: ClassVar[bool] = False

    def slots(self, shape: tuple[int, ...], view: View, group: Group, along: str | None) -> Slots:
        """What it keeps for (low-rank) gradients of ``shape``, whose first axis runs along ``along`` of the weight."""
        return {}

    def direction(self, low: Tensor, state: State, group: Group, norms: Tensor | None = None) -> Tensor:
        """The direction before bias correction, in fp32 or wider; moments are updated in place.

        Args:
            norms: (2, ..., rows), where the norms of the rows of ``low`` and of the direction are wanted (overwritten).
        """
        raise NotImplementedError

    def missing(self, low: Tensor, state: State, group: Group) -> Scalar:
        """What stands for the low-rank gradient where that is not finite."""
        return 0.0

    def update_(self, weight: Tensor, grad: Tensor, state: State, group: Group, *, size: Scalar, decay: Scalar) -> bool:
        """weight = decay weight + size direction(grad), rounded as the group says, where one kernel makes all of it.

        Values of the gradient that are not finite count as zeros. False where there is no such kernel.
        """
        return False

    def add_direction_(self, target: Tensor, grad: Tensor, state: State, group: Group, *, alpha: Scalar) -> None:
        """target += alpha * direction(grad)."""
        add_(target, self.direction(grad, state, group), alpha)

    def correction(self, step: int | Tensor, group: Group) -> Scalar:
        """Bias correction as a factor of the step size."""
        return 1.0

    def transport(self, state: State, overlap: Tensor, group: Group) -> None:
        """Move the moments into a new basis in place; ``overlap`` as in :class:`Refresh`."""


class Lift(Part):
    """Turns a direction into an update of the whole weight."""

    # Whether `update` gets Norms.
    needs_norms: ClassVar[bool] = False
    # Whether the direction is projected back as it is: it may come in the dtype of the weight and in the place of the
    # low-rank gradient, which nobody reads any more.
    passes_direction: ClassVar[bool] = False
    # Whether `update` reads ``step.low``, which then holds zeros where the gradient is not finite.
    reads_low: ClassVar[bool] = False
    # Whether `before` may return another tensor than the gradient.
    changes_gradient: ClassVar[bool] = False
    # As of a subspace, for the whole update.
    splits: ClassVar[frozenset[str]] = frozenset()

    def reads_gradient(self, group: Group) -> bool:
        """Whether an update takes more of the gradient than its projection."""
        return True

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        """What it keeps for a weight whose oriented gradient has ``shape``."""
        return {}

    def before(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The oriented gradient that the step works on; error feedback adds the error, into a new tensor."""
        return grad

    def update(self, step: Step, state: State, group: Group) -> Update:
        """The update of the oriented weight."""
        raise NotImplementedError

    def after(self, step: Step, state: State, group: Group) -> None:
        """Keep what the next step needs. ``step.grad`` may be overwritten where ``before`` made it."""


class Parts(NamedTuple):
    """What updates a parameter; without a subspace it gets ``rule`` on its gradient as it is."""

    subspace: Subspace | None
    rule: Rule
    lift: Lift


class Step(NamedTuple):
    """What a lift sees of one step. All are oriented.

    grad: the gradient as ``before`` returned it; an empty tensor where only ``low`` is known.
    low: its projection; not finite where the gradient is not, unless the lift ``reads_low``.
    direction: what the rule made of it; may be overwritten.
    norms: where the lift needs them.
    ok: whether the gradient is finite, a bool or a tensor as :func:`lowrank_optim.optim.finite.verdict` tells it.
    subspace: projects back.
    shape: of the whole oriented weight, of which a process may have some rows or columns.
    sums: where all of these are some rows of the whole.
    """

    grad: Tensor
    low: Tensor
    direction: Tensor
    norms: Norms | None
    ok: bool | Tensor
    subspace: Subspace
    shape: tuple[int, ...]
    sums: Sums | None = None


def add_(target: Tensor, direction: Tensor, alpha: Scalar) -> None:
    """target += alpha * direction."""
    if isinstance(alpha, Tensor):
        target.add_(direction * alpha)
    else:
        target.add_(direction, alpha=alpha)
