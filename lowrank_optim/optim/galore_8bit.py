"""GaLore with both moments in 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowrank_optim.optim.galore import GaLoreAdamW


class GaLoreAdamW8bit(GaLoreAdamW):
    """:class:`GaLoreAdamW` whose moments are stored in bitsandbytes' blockwise 8-bit format.

    Every 256 consecutive values of a moment share an fp32 scale; each is one of the 256 codes of the dynamic map,
    signed for M and unsigned for V. A step reads them as fp32, computes as :class:`GaLoreAdamW` does, direction
    included, and writes M and V back to the nearest codes. Moments of fewer than 4096 values stay fp32, and so do those
    of a group with ``state_dtype="float32"`` (embeddings, say). bitsandbytes itself is not needed, on the CPU neither.

    Args:
        params, lr, betas, rank, update_proj_gap, scale, proj_type, refresh, selection, moments, stagger: as in
            :class:`GaLoreAdamW`, and so are weight_rounding, maximize, capturable, backend.
        eps: added to the uncorrected sqrt(V), >= 0.
        weight_decay: decoupled, >= 0; not zero by default, as published.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Zhao et al. 2024 (arXiv 2403.03507), section 4.3; Dettmers et al. 2022 (arXiv 2110.02861).

    Deviations: the published class calls bitsandbytes' Adam, which adds eps after the bias correction; here it stands
    beside the uncorrected sqrt(V), which is eps / sqrt(1 - beta2^t) on the corrected scale (3e-7 at the first step,
    1e-8 from the 5000th). Decay comes after the update for all parameters, there only for compressed ones. Blocks run
    along the rows of the low-rank gradient with the compressed side last, there along those of its own orientation. The
    published class under bitsandbytes 0.50 freezes moments of fewer than 4096 values; here they are updated. The other
    deviations are those of :class:`GaLoreAdamW`.
    """

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
        refresh: str = "power",
        selection: str = "top",
        moments: str = "keep",
        stagger: bool = False,
        weight_rounding: str = "nearest",
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            refresh=refresh,
            selection=selection,
            moments=moments,
            stagger=stagger,
            state_dtype="int8",
            weight_rounding=weight_rounding,
            maximize=maximize,
            capturable=capturable,
            backend=backend,
        )
