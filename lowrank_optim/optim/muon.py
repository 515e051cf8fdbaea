"""Muon: steps along the momentum with all singular values set to about 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.ops.newton_schulz import newton_schulz
from lowrank_optim.optim.finite import zero_unless
from lowrank_optim.optim.lifts.momentum import SCALINGS, check_precision, update_scale
from lowrank_optim.optim.options import Common, arguments, flag, number, one_of, positive_int
from lowrank_optim.optim.parts import Group, Lift, Option, Parts, Slots, State, Step, Update, View
from lowrank_optim.optim.rules.adam import CorrectedAdam
from lowrank_optim.optim.state_storage import load_moment, moment_slots, replace_moment_
from lowrank_optim.optim.subspaces.whole import Unchanged, Whole
from lowrank_optim.optim.two_rates import TwoRates


class Orthogonalized(Lift):
    """The orthogonalised mean of gradients, which is the state ``momentum``."""

    options = {
        "momentum": Option(number(0.0, 1.0, high_open=True), 0.95),
        "nesterov": Option(flag, True),
        "ns_steps": Option(positive_int, 5),
        "scaling": Option(one_of(*SCALINGS), "kimi"),
    }

    def check(self, group: Group) -> None:
        check_precision(group)

    def slots(self, view: View, shape: tuple[int, ...], group: Group) -> Slots:
        return moment_slots("momentum", shape, view.wide, group["state_dtype"], "elements")

    def update(self, step: Step, state: State, group: Group) -> Update:
        ahead = self._ahead(step, state, group)
        rows, columns = ahead.shape[-2:]
        tall = zero_unless(step.ok, ahead if rows >= columns else ahead.mT)
        found = newton_schulz(tall, steps=group["ns_steps"], backend=group["backend"]).to(ahead.dtype)
        found.mul_(update_scale(rows, columns, group["scaling"]))
        return Update(full=found if rows >= columns else found.mT)

    def _ahead(self, step: Step, state: State, group: Group) -> Tensor:
        """What is orthogonalised, which is never what was rounded for the state."""
        before = load_moment(state, "momentum", step.grad.dtype)
        grad = step.grad.to(before.dtype)
        mean = before.lerp(grad, 1 - group["momentum"])
        replace_moment_(state, "momentum", mean, step.ok)
        return mean.lerp_(grad, 1 - group["momentum"]) if group["nesterov"] else mean


class Muon(TwoRates):
    """Orthogonalised momentum for matrices, AdamW for everything else.

    For a weight W (m, n) with gradient G::

        B = momentum B + (1 - momentum) G
        U = momentum B + (1 - momentum) G              # nesterov; else U = B
        W = (1 - lr weight_decay) W
        W = W - lr scale NewtonSchulz(U)

    Embeddings, heads, vectors and groups with ``rank=None`` get AdamW. A fused matrix, such as Q, K and V in one, is
    orthogonalised as one.

    Args:
        params: tensors (every matrix counts), ``model.named_parameters()``, :func:`low_rank_groups`, or groups.
        lr: learning rate, a number >= 0 or a one-element tensor; with "kj" the usual one is 0.02.
        betas: decay of AdamW's two moments, each in [0, 1).
        eps: AdamW's, >= 0.
        weight_decay: decoupled, >= 0, of both kinds.
        momentum: decay of B, in [0, 1).
        nesterov: look ahead by the present gradient.
        ns_steps: Newton-Schulz iterations, >= 1.
        scaling: the factor ``scale`` for a weight (m, n): "kimi" 0.2 sqrt(max(m, n)), with which AdamW's learning rate
            and decay fit (``match_rms_adamw`` in torch), "kj" sqrt(max(1, m/n)) (``original``), "dion" sqrt(m/n),
            "none" 1.
        adamw_lr: learning rate of AdamW while ``lr`` has its initial value; None is ``lr``.
        common: stagger (without effect), state_dtype (of B too; "int4" is for AdamW alone), weight_rounding, maximize,
            capturable, backend; see :class:`lowrank_optim.optim.options.Common`.

    Raises:
        ValueError: an argument out of range, or no parameters.
        RuntimeError: in ``step``, a sparse gradient.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); "kimi": Liu et al. 2025 (arXiv 2502.16982);
    8-bit states: arXiv 2509.23106.

    Deviations: ``torch.optim.Muon`` has "original" scaling by default, refuses what is no matrix, and iterates in
    bfloat16 on the CPU too, here in fp32. With ``state_dtype="int8"`` B is in the dynamic format of 256 values a block
    of all moments here, where the paper has linear codes, 2048 a block. Gradients that are missing count as none, not
    as zeros. Experts are a batch of matrices, convolutions are matrices (out, in * kernel).
    """

    triple = Parts(Whole(), Unchanged(), Orthogonalized())
    full_rank = CorrectedAdam()
    decay_first = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        scaling: str = "kimi",
        adamw_lr: float | Tensor | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"rank": 1, **arguments(locals())})
