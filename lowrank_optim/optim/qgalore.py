"""Q-GaLore: a 4-bit basis that is renewed less and less often while the subspace stands still, 8-bit moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.int4 import dequantize_int4, group_count, packed_shape, quantize_int4_
from lowrank_optim.optim.checks import check_choice, check_positive_int, check_range
from lowrank_optim.optim.galore import GaLore, TopSingular
from lowrank_optim.optim.protocols import Group, Refresh, State
from lowrank_optim.optim.rules import Adam


class LazyInt4(TopSingular):
    """:class:`TopSingular` with a basis of two 4-bit values a byte and a gap that grows with the overlap of the bases.

    The basis is used as it comes back from 4 bits, for both directions; it is orthonormal to about 0.1.
    """

    def validate(self, group: Group) -> None:
        """Raise ValueError on hyper-parameters out of range, or on a quantization that is not this one."""
        super().validate(group)
        check_range("cos_threshold", group["cos_threshold"], low=0.0, high=1.0)
        check_range("gamma_proj", group["gamma_proj"], low=1.0)
        check_positive_int("queue_size", group["queue_size"])
        check_positive_int("quant_group_size", group["quant_group_size"])
        # The keys of the published package that have one meaningful value here.
        check_choice("quant", group.get("quant", True), (True,))
        check_choice("quant_n_bit", group.get("quant_n_bit", 4), (4,))

    def init(self, param: Tensor, state: State, group: Group) -> torch.Size:
        """``left``, the packed basis, ``gap`` and ``overlaps`` (queue_size,), of which NaN are still to come."""
        shape = super().init(param, state, group)
        d, columns = _as_real(state.pop("basis")).shape
        groups = group_count(d, columns, group["quant_group_size"])
        state["basis.codes"] = torch.zeros(packed_shape(d, columns), dtype=torch.uint8, device=param.device)
        state["basis.scale"] = torch.zeros(groups, dtype=torch.float32, device=param.device)
        state["basis.zero"] = torch.zeros(groups, dtype=torch.uint8, device=param.device)
        state["gap"] = group["update_proj_gap"]
        state["overlaps"] = torch.full((group["queue_size"],), torch.nan, dtype=torch.float32, device=param.device)
        return shape

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """The basis (d, rank) from 4 bits, in the dtype of ``like``."""
        values = dequantize_int4(
            state["basis.codes"],
            state["basis.scale"],
            state["basis.zero"],
            group["rank"] * (2 if like.is_complex() else 1),
            group_size=group["quant_group_size"],
        )
        if like.is_complex():
            values = torch.view_as_complex(values.view(len(values), -1, 2))
        return values.to(like.dtype)

    def keep_basis_(self, basis: Tensor, state: State, group: Group) -> None:
        """Quantize and pack."""
        quantize_int4_(
            state["basis.codes"], state["basis.scale"], state["basis.zero"], _as_real(basis),
            group_size=group["quant_group_size"],
        )  # fmt: skip

    def replace_basis_(self, old: Tensor, basis: Tensor, state: State, group: Group) -> Refresh:
        """Renew the basis; lengthen ``gap`` where the last ``queue_size`` bases kept ``cos_threshold`` on average."""
        result = super().replace_basis_(old, basis, state, group)
        if int(state["step"]) > 0:
            shared = (old.mH @ self.basis(old, state, group)).abs().float()
            state["overlaps"].copy_(torch.cat((state["overlaps"][1:], shared.square().sum().view(1) / group["rank"])))
            # A NaN, that is a queue that is not full, compares as False.
            if float(state["overlaps"].mean()) >= group["cos_threshold"]:
                state["gap"] = int(state["gap"] * group["gamma_proj"])
        return result


def _as_real(basis: Tensor) -> Tensor:
    return torch.view_as_real(basis.resolve_conj()).flatten(1) if basis.is_complex() else basis


class QGaLoreAdamW8bit(GaLore):
    """GaLore with 8-bit moments, a 4-bit basis and refreshes that become rare where the subspace stands still.

    Updates are those of :class:`GaLoreAdamW` with P rounded to 4 bits in groups. At a refresh from P to P'::

        c = |Pᴴ P'|² / rank                # share of P within P', 1 where nothing changed, rank / side at random
        if mean of the last queue_size c >= cos_threshold:
            gap = int(gap gamma_proj)      # refreshes follow the steps 1, 1 + gap, 1 + 2 gap, ...

    Tensors of more dimensions, and ``proj_type="full"``, keep GaLore's bases and a constant gap. The weights become
    int8 by :func:`lowrank_optim.nn.quantize_weights`, before the optimizer is made.

    Args:
        params, lr, betas, rank, scale, proj_type, refresh, moments, stagger: as in :class:`GaLoreAdamW`, and so are
            weight_rounding, maximize, capturable, backend.
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0; not zero by default, as published.
        update_proj_gap: updates between two refreshes at the start, >= 1.
        cos_threshold: mean overlap from which on the gap grows, in [0, 1].
        gamma_proj: factor by which it grows, >= 1; 1 keeps it constant.
        queue_size: number of overlaps in the mean, >= 1; the gap stays until there are so many.
        quant_group_size: values of the basis that share a scale and a zero point, >= 1.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhang et al. 2024 (arXiv 2407.08296).

    Deviations: the published code compares the first singular vectors only, with their arbitrary sign, and stores a
    byte a value of P; its zero points are cut off in groups of one sign. ``refresh="randomized"`` instead of the SVD;
    not "power", whose start from the old P makes any two bases overlap. int8 weights are symmetric, in groups along a
    row, and updated in fp32: bfloat16, as published, realises 4 % of an update of 0.003 steps. eps, decay and small
    moments are as in ``GaLoreAdamW8bit``.
    """

    subspace = LazyInt4()
    rule = Adam()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "randomized",
        cos_threshold: float = 0.4,
        gamma_proj: float = 2,
        queue_size: int = 5,
        quant_group_size: int = 256,
        moments: str = "keep",
        stagger: bool = False,
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
                "cos_threshold": cos_threshold,
                "gamma_proj": gamma_proj,
                "queue_size": queue_size,
                "quant_group_size": quant_group_size,
                "moments": moments,
                "stagger": stagger,
                "state_dtype": "int8",
                "weight_rounding": weight_rounding,
                "maximize": maximize,
                "capturable": capturable,
                "backend": backend,
            },
        )
