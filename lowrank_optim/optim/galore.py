"""GaLore: Adam in the dominant singular subspace of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.orthonormal import orthonormalize, range_finder, subspace_iteration
from lowrank_optim.optim.base import LowRankOptimizer
from lowrank_optim.optim.checks import check_choice
from lowrank_optim.optim.protocols import Group, Plain, Refresh, State, Subspace
from lowrank_optim.optim.rules import Adam
from lowrank_optim.optim.sketches import sketch_matrix

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
REFRESHES = ("power", "randomized", "svd")
SELECTIONS = ("top", "spectral")


def draw_spectral(singular_values: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """``rank`` distinct indices, ascending, drawn half uniformly and half in proportion to the singular values.

    Source: Zhao et al. 2024, Sparse Spectral Training (arXiv 2405.15481).

    Args:
        singular_values: (q,), not all zero.
        rank: at most q.
        generator: a CPU generator.
    """
    weights = singular_values.double().cpu()
    probabilities = 0.5 / len(weights) + 0.5 * weights / weights.sum()
    return torch.multinomial(probabilities, rank, generator=generator).sort().values


def top_basis(
    tall: Tensor, rank: int, group: Group, state: State, *, left: bool, key: str, start: Tensor | None = None
) -> Tensor | None:
    """The ``rank`` dominant right-singular vectors of an oriented gradient, None where all attempts failed.

    With the group's ``selection="spectral"`` the singular vectors are drawn instead.

    Args:
        tall: (rows, d), the side to compress last.
        left: whether ``tall`` is the transpose of the gradient. The SVD is taken of the gradient as it is, which
            makes the signs those of the published code.
        key: where the state keeps the previous basis, unless ``start`` gives it.
    """
    grad = tall.to(torch.promote_types(tall.dtype, torch.float32))
    basis: Tensor | None = None
    generator = torch.Generator()
    seed = state["seed"] * 1_000_003 + 2 * int(state["step"])
    if group["refresh"] == "svd":
        try:
            # No copy of the gradient: LAPACK's input is overwritten in torch's own buffer.
            u, singular_values, vh = torch.linalg.svd(grad.mT if left else grad, full_matrices=False)
            if group.get("selection", "top") == "spectral":
                drawn = draw_spectral(singular_values, rank, generator.manual_seed(seed)).to(u.device)
                basis = u[:, drawn].conj() if left else vh[drawn].mH
            else:
                basis = u[:, :rank].conj() if left else vh[:rank].mH
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            basis = None
    elif group["refresh"] == "power" and int(state["step"]) > 0:
        basis = subspace_iteration(grad, (state[key] if start is None else start).to(grad.dtype))
    for attempt in range(2):
        if basis is not None and bool(basis.sum().isfinite()):
            return basis
        try:
            basis = range_finder(grad, rank, generator.manual_seed(seed + attempt))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            basis = None
    return basis if basis is not None and bool(basis.sum().isfinite()) else None


class TopSingular:
    """The dominant singular subspace on one side of a matrix.

    ``std`` compresses the smaller side, ``reverse_std`` the larger one, ``left`` the rows, ``right`` the columns.
    A gradient is oriented so that its compressed side is the last: low = tall @ basis, up(low) = low @ basisᴴ.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on an unknown proj_type or refresh."""
        check_choice("proj_type", group["proj_type"], PROJ_TYPES)
        check_choice("refresh", group["refresh"], REFRESHES)
        selection = group.get("selection", "top")
        check_choice("selection", selection, SELECTIONS)
        if selection == "spectral" and group["refresh"] != "svd":
            raise ValueError(f"Invalid refresh: {group['refresh']!r}, selection='spectral' takes 'svd' only")

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        """Matrices whose smaller side exceeds the rank."""
        return len(shape) == 2 and min(shape) > group["rank"]

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left``, and an empty ``basis`` (d, rank) in the parameter's dtype."""
        rows, columns = param.shape
        state["left"] = {
            "std": rows < columns,
            "reverse_std": rows >= columns,
            "left": True,
            "right": False,
        }[group["proj_type"]]
        rest, d = self.orient(param, state).shape
        state["basis"] = param.new_zeros(d, group["rank"])
        return torch.Size((rest, group["rank"]))

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The view whose last axis is the compressed one."""
        return tensor.mT if state["left"] else tensor

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Replace the basis by the dominant directions of this gradient."""
        old = self.basis(grad, state, group)
        basis = top_basis(grad, group["rank"], group, state, left=state["left"], key="basis", start=old)
        if basis is None:
            return Refresh(renewed=False)
        return self.replace_basis_(old, basis, state, group)

    def replace_basis_(self, old: Tensor, basis: Tensor, state: State, group: Group) -> Refresh:
        """Go over from one basis to another as ``moments`` says."""
        state.pop("pending", None)
        overlap = None
        if group["moments"] != "keep" and int(state["step"]) > 0:
            overlap = old.to(basis.dtype).mH @ basis
            if group["moments"] == "align":
                # A new column that is orthogonal to its predecessor keeps the sign that it came with.
                turn = overlap.diagonal().conj().sgn()
                basis = basis * torch.where(turn == 0, torch.ones_like(turn), turn)
                overlap = None
        self.keep_basis_(basis, state, group)
        return Refresh(renewed=True, overlap=overlap)

    def sums(self, group: Group) -> bool:
        """An SVD takes the whole gradient; a subspace iteration spread over two updates does not."""
        return group["refresh"] != "svd"

    def sketch(self, grad: Tensor, state: State, group: Group) -> Tensor | None:
        """First phase: none (``down`` is G P already), or G times a Gaussian matrix; second phase: Gᴴ Q."""
        if "pending" in state:
            return grad.mH @ state["pending"].to(grad.dtype)
        if group["refresh"] == "power":
            return None
        return grad @ sketch_matrix(grad.shape[1], group["rank"], grad, state, group)

    def refresh_from_sums(
        self, low: Tensor, sketch: Tensor | None, state: State, group: Group, *, dtype: torch.dtype
    ) -> Refresh:
        """Half a subspace iteration: Q = qr(G P) is put aside; at the next update P = qr(Gᴴ Q)."""
        image = orthonormalize(low if sketch is None else sketch)
        if "pending" not in state:
            state["pending"] = image.to(dtype)
            return Refresh(renewed=False)
        return self.replace_basis_(self.basis(image, state, group), image, state, group)

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """The basis (d, rank) that meets ``like``, an oriented gradient or weight."""
        return state["basis"]

    def keep_basis_(self, basis: Tensor, state: State, group: Group) -> None:
        """Overwrite the basis that is kept."""
        state["basis"].copy_(basis)

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """(rows, rank)."""
        return grad @ self.basis(grad, state, group)

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """One GEMM that accumulates in the weight itself."""
        if isinstance(alpha, Tensor):
            low, alpha = low * alpha, 1.0
        basis = self.basis(target, state, group)
        target.addmm_(low.to(target.dtype), basis.mH.to(target.dtype), alpha=alpha)


def along_axis(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply ``matrix`` (k, d) into one axis (of length d) of a tensor; the axis becomes k long."""
    if tensor.ndim == 2:
        return matrix @ tensor if axis == 0 else tensor @ matrix.mT
    return torch.tensordot(tensor, matrix, dims=([axis], [1])).movedim(-1, axis)


class Tucker:
    """The dominant singular subspaces of several axes at once: a truncated higher-order SVD.

    ``moments`` other than "keep" do not apply here: a core is turned along every axis at once.

    Every axis longer than the rank is compressed, the others (a convolution's kernel) are left alone. For a matrix
    this is ``proj_type="full"``: low = PᵀGQ. Source: De Lathauwer, De Moor, Vandewalle 2000.
    """

    def validate(self, group: Group) -> None:
        """Nothing beyond what :class:`TopSingular` checks."""

    def compresses(self, shape: torch.Size, group: Group) -> bool:
        """Tensors of two or more dimensions with an axis longer than the rank (matrices: both)."""
        if len(shape) == 2:
            return min(shape) > group["rank"]
        return len(shape) > 2 and max(shape) > group["rank"]

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """An empty ``basis.k`` (d_k, rank) for every compressed axis k."""
        rank = group["rank"]
        for axis, d in enumerate(param.shape):
            if d > rank:
                state[f"basis.{axis}"] = param.new_zeros(d, rank)
        return torch.Size(min(d, rank) for d in param.shape)

    def orient(self, tensor: Tensor, state: State) -> Tensor:
        """The tensor itself."""
        return tensor

    def _axes(self, tensor: Tensor, state: State) -> list[int]:
        return [axis for axis in range(tensor.ndim) if f"basis.{axis}" in state]

    def refresh(self, grad: Tensor, state: State, group: Group) -> Refresh:
        """Replace every basis, or none; the moments are kept."""
        bases: dict[str, Tensor] = {}
        for axis in self._axes(grad, state):
            unfolding = grad.movedim(axis, -1).reshape(-1, grad.shape[axis])
            left = grad.ndim == 2 and axis == 0
            basis = top_basis(unfolding, group["rank"], group, state, left=left, key=f"basis.{axis}")
            if basis is None:
                return Refresh(renewed=False)
            bases[f"basis.{axis}"] = basis
        for key, basis in bases.items():
            state[key].copy_(basis)
        return Refresh(renewed=True)

    def down(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """The core: every compressed axis shortened to the rank."""
        for axis in self._axes(grad, state):
            grad = along_axis(grad, state[f"basis.{axis}"].mT, axis)
        return grad

    def add_up_(self, target: Tensor, low: Tensor, state: State, group: Group, *, alpha: float | Tensor) -> None:
        """target += alpha * (low expanded along every compressed axis)."""
        low = (low * alpha).to(target.dtype)
        for axis in self._axes(target, state):
            low = along_axis(low, state[f"basis.{axis}"].conj().to(target.dtype), axis)
        target.add_(low)


TUCKER = Tucker()


class GaLore(LowRankOptimizer):
    """What GaLore's optimizers share: a subclass names its rule and declares its arguments."""

    subspace = TopSingular()
    lift = Plain()

    def subspace_of(self, param: Tensor, group: Group) -> Subspace:
        """Tucker for tensors of more than two dimensions and for ``proj_type="full"``."""
        several = param.ndim > 2 or group["proj_type"] == "full"
        if several and group["rank"] is not None and TUCKER.compresses(param.shape, group):
            return TUCKER
        return super().subspace_of(param, group)


class GaLoreAdamW(GaLore):
    """AdamW whose moments live in the dominant singular subspace of the gradient.

    For a weight W (m, n) with gradient G, at updates 1, 1 + gap, 1 + 2 gap, ... P becomes the ``rank`` dominant
    singular vectors of G on its smaller side (n <= m: G P; else Gᵀ P). Then::

        R = G P                                        # (m, rank)
        M = beta1 M + (1 - beta1) R
        V = beta2 V + (1 - beta2) R²
        N = M / (sqrt(V) + eps)
        W = W - lr sqrt(1 - beta2^t) / (1 - beta1^t) scale N Pᵀ
        W = (1 - lr weight_decay) W

    Tensors of more dimensions are compressed along every axis longer than the rank (Tucker). Parameters that
    are not compressed (vectors, sides not exceeding the rank, groups with ``rank=None``) follow the same formulas with
    P = I and scale = 1.

    Args:
        params: tensors (every matrix is compressed), ``model.named_parameters()`` (embeddings, head, norms and
            biases stay full-rank), :func:`low_rank_groups`, or groups as the published package takes them.
        lr: learning rate, a number >= 0 or a one-element tensor.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0.
        rank: columns of P, >= 1; None is the full-rank rule.
        update_proj_gap: updates between two refreshes of P, >= 1.
        scale: factor of the lifted update, >= 0.
        proj_type: "std" compresses the smaller side, "reverse_std" the larger, "left" the rows, "right" the columns,
            "full" both.
        refresh: "power" (one subspace iteration from the previous P, the first from a Gaussian sketch),
            "randomized" (a new Gaussian sketch with two power iterations) or "svd" (exact).
        moments: "keep" (as published), "align" (kept; each new column's sign turned towards the old one's) or "rotate"
            (moved by the overlap of the two bases). On C4 text neither of the latter lowers the loss of a small LLaMA
            beyond the spread over seeds (``benchmarks/converge.py``), so the default is the published one.
        stagger: spread the refreshes of the parameters over the gap instead of one step for all.
        state_dtype: storage of the moments: "float32", "bfloat16" (stochastically rounded) or "int8" (blockwise).
        weight_rounding: of bfloat16 weights: "nearest", "stochastic" or "compensated" (an int8 correction is kept).
        maximize: ascend.
        capturable: step counters on the device, for CUDA graphs; see :class:`LowRankOptimizer`.
        backend: None (Triton on CUDA where importable, else eager), "eager" or "triton".

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507), algorithm 2.

    Deviations: P comes from a randomized method unless ``refresh="svd"``, which reproduces the published trajectories.
    Moments are fp32 where the published code takes the gradient's dtype. A rank of at least the smaller side is the
    full-rank rule, without scale. A zero or non-finite gradient never sets a basis. As in the published code, unlike
    in the paper: eps stands beside the uncorrected sqrt(V), decay comes after the update, moments stay at a refresh.
    """

    rule = Adam()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "power",
        selection: str = "top",
        moments: str = "keep",
        stagger: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "scale": scale,
                "proj_type": proj_type,
                "refresh": refresh,
                "selection": selection,
                "moments": moments,
                "stagger": stagger,
                "state_dtype": state_dtype,
                "weight_rounding": weight_rounding,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )
