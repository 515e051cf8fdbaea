"""Q-GaLore: a 4-bit basis that is renewed less and less often while the subspace stands still, 8-bit moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops import pick
from lowrank_optim.ops.int4 import dequantize_int4, group_count, packed_shape, quantize_int4_
from lowrank_optim.optim.galore import GaLore
from lowrank_optim.optim.lifts.plain import Plain
from lowrank_optim.optim.options import Common, arguments, number, one_of, positive_int
from lowrank_optim.optim.parts import Group, Number, Option, Parts, Refresh, Slot, Slots, State, View, Which
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.subspaces.singular import TopSingular


class LazyInt4(TopSingular):
    """:class:`TopSingular` with a basis of two 4-bit values a byte and a gap that grows with the overlap of the bases.

    The basis is used as it comes back from 4 bits, in both directions; it is orthonormal to about 0.1.
    """

    accumulation = TopSingular.accumulation
    orthonormal = False
    options = {
        **TopSingular.options,
        "refresh": TopSingular.options["refresh"]._replace(default="randomized"),
        "cos_threshold": Option(number(0.0, 1.0), 0.4),
        "gamma_proj": Option(number(1.0), 2),
        "queue_size": Option(positive_int, 5),
        "quant_group_size": Option(positive_int, 256),
        # The keys of the published package that have one meaningful value here.
        "quant": Option(one_of(True), True),
        "quant_n_bit": Option(one_of(4), 4),
    }

    def slots(self, view: View, group: Group) -> Slots:
        """The packed basis, ``gap``, and ``overlaps`` (queue_size,); NaN marks entries that are not filled yet."""
        slots = super().slots(view, group)
        basis = slots.pop("basis")
        assert isinstance(basis, Slot)
        d, columns = basis.shape[-2:]
        columns *= 2 if view.dtype.is_complex else 1
        groups = (*view.batch, group_count(d, columns, group["quant_group_size"]))
        return {
            **slots,
            "basis.codes": Slot((*view.batch, *packed_shape(d, columns)), torch.uint8, basis.along),
            "basis.scale": Slot(groups, torch.float32),
            "basis.zero": Slot(groups, torch.uint8),
            "gap": Number(group["update_proj_gap"]),
            "overlaps": Slot((group["queue_size"],), torch.float32, fill=torch.nan),
        }

    def makes_basis(self, group: Group) -> bool:
        """It comes from 4 bits."""
        return True

    def basis(self, like: Tensor, state: State, group: Group) -> Tensor:
        """The (..., d, rank) basis from 4 bits, in the dtype of ``like``."""
        codes = state["basis.codes"]
        values = pick(dequantize_int4, group["backend"], codes.device)(
            codes, state["basis.scale"], state["basis.zero"], state["rank"] * (2 if like.is_complex() else 1),
            group_size=group["quant_group_size"], dtype=like.dtype.to_real(),
        )  # fmt: skip
        return torch.view_as_complex(values.view(*values.shape[:-1], -1, 2)) if like.is_complex() else values

    def keep_basis_(self, basis: Tensor, state: State, group: Group) -> None:
        """Quantize and pack."""
        values = torch.view_as_real(basis.resolve_conj()).flatten(-2) if basis.is_complex() else basis
        quantize_int4_(
            state["basis.codes"], state["basis.scale"], state["basis.zero"], values,
            group_size=group["quant_group_size"],
        )  # fmt: skip

    def replace_basis_(self, basis: Tensor, state: State, group: Group, which: Which) -> Refresh:
        """Renew the basis; lengthen ``gap`` where the last ``queue_size`` bases kept ``cos_threshold`` on average."""
        old = self.basis(basis, state, group)
        result = super().replace_basis_(basis, state, group, which)
        if which.warm is not False:
            shared = (old.mH @ self.basis(basis, state, group)).abs().float().square().sum((-2, -1)).mean()
            state["overlaps"].copy_(torch.cat((state["overlaps"][1:], shared.view(1) / state["rank"])))
            # A NaN, that is a queue that is not full, compares as False.
            if float(state["overlaps"].mean()) >= group["cos_threshold"]:
                state["gap"] = int(state["gap"] * group["gamma_proj"])
        return result


class QGaLoreAdamW8bit(GaLore):
    """GaLore with 8-bit moments, a 4-bit basis and refreshes that become rare where the subspace stands still.

    Updates are those of :class:`GaLoreAdamW` with P rounded to 4 bits in groups. At a refresh from P to P'::

        c = |Pᴴ P'|² / rank                # share of P within P': 1 if nothing changed, rank / side at random
        if mean of the last queue_size c >= cos_threshold:
            gap = int(gap gamma_proj)      # refreshes follow the steps 1, 1 + gap, 1 + 2 gap, ...

    Convolutions, and ``proj_type="full"``, keep GaLore's bases and a constant gap; a stack of matrices has one gap,
    which follows the mean of their overlaps. The weights become
    int8 by :func:`lowrank_optim.nn.quantize_weights`, before the optimizer is made.

    Args:
        params, lr, betas, rank, scale, proj_type, refresh, moments: as in :class:`GaLoreAdamW`, and so are the common
            stagger, state_dtype ("int8" here), weight_rounding, maximize, capturable and backend.
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0; not zero by default, as published.
        update_proj_gap: updates between two refreshes at the start, >= 1.
        cos_threshold: mean overlap at and above which the gap grows, in [0, 1].
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

    triple = Parts(LazyInt4(), Adam(), Plain())

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
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"state_dtype": "int8", **arguments(locals())})
