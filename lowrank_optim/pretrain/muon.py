"""torch.optim.Muon refuses embeddings and norms; one optimizer that gives those to AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

NamedParameters = Sequence[tuple[str, nn.Parameter]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices and AdamW for the rest, with one ``param_groups`` and one ``state``.

    Args:
        hidden: named 2-D matrices for Muon.
        rest: named parameters for AdamW, possibly none.
        lr: learning rate of both; the default ``adjust_lr_fn`` scales Muon's update to the size of AdamW's.
        weight_decay: of both.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: see ``torch.optim.Muon``.

    Deviations: torch's default for ``adjust_lr_fn`` is "original", which wants a learning rate of its own.
    """

    def __init__(
        self,
        hidden: NamedParameters,
        rest: NamedParameters,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
    ) -> None:
        muon = torch.optim.Muon(
            hidden,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._members: dict[str, torch.optim.Optimizer] = {"muon": muon}
        if rest:
            self._members["adamw"] = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
        for method, member in self._members.items():
            for group in member.param_groups:
                group["method"] = method
        super().__init__([group for member in self._members.values() for group in member.param_groups], {})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_members": self._members}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all parameters; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for method, member in self._members.items():
            # load_state_dict replaces both objects, so they are handed over anew.
            member.param_groups = [group for group in self.param_groups if group["method"] == method]
            member.state = self.state
            member.step()
        return loss
