"""When bases are renewed, and those of which matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.optim.parts import Group, State, Subspace, View, Which


def refresh_due(state: State, group: Group, place: int) -> bool:
    """Whether the coming step refreshes the basis: it is scheduled, or matrices wait for one.

    While a CUDA graph is being captured the answer is no, and so it is where there is no basis.
    """
    if "waiting" not in state:
        return False
    step = state["step"]
    if isinstance(step, Tensor) and step.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(state["waiting"]) or until_refresh(int(step), state, group, place) == 0


def scheduled(state: State, group: Group, place: int) -> bool:
    """Whether the coming step is one of 1, 1 + gap, 1 + 2 gap, ... of the parameter.

    With ``stagger`` the first is the same, the later ones are moved by a share of the gap that the golden ratio spreads
    evenly over the places of the parameters.
    """
    # A tensor is read from the device: a capturable step should run inside of a CUDA graph, where nothing is due.
    return until_refresh(int(state["step"]), state, group, place) == 0


def until_refresh(step: int, state: State, group: Group, place: int) -> int:
    """How many updates come after ``step`` of them before one is scheduled to refresh, 0 if the next one is."""
    if step == 0:
        return 0
    # A lazy subspace keeps a gap of its own.
    gap: int = state["gap"] if "gap" in state else group["update_proj_gap"]
    offset = int(gap * (place * 0.6180339887498949 % 1.0)) if group["stagger"] else 0
    return -(step + offset) % gap


def largest(grad: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The largest magnitude in every matrix of a batch, (matrices,), NaN where one is."""
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    values = values.reshape(*batch, -1) if batch else values
    if batch:
        extremes = torch.stack((values.amax(-1), values.amin(-1)))
    else:
        # Unlike abs(), aminmax makes no copy of the gradient.
        extremes = torch.stack(torch.aminmax(values))
    return extremes.abs().amax(0).view(-1)


def select_matrices(
    subspace: Subspace, sizes: list[float], view: View, state: State, device: torch.device, is_scheduled: bool
) -> tuple[Which | None, int]:
    """The matrices that a refresh is about, None for none, and those that wait after it, as the bits of an int."""
    waiting = state["waiting"]
    if is_scheduled and int(state["step"]) == 0:
        waiting = (1 << len(sizes)) - 1
    if not subspace.follows_gradient:
        return Which(warm=int(state["step"]) > 0), 0
    wanted = [size > 0 and (is_scheduled or waiting >> i & 1 == 1) for i, size in enumerate(sizes)]
    cold = [waiting >> i & 1 == 1 for i in range(len(sizes))]
    left = sum(1 << i for i, (is_cold, gets) in enumerate(zip(cold, wanted)) if is_cold and not gets)
    if not any(wanted):
        return None, left

    def mask(flags: list[bool]) -> Tensor:
        return torch.tensor(flags, device=device).view(*view.batch, 1, 1)

    warm = not cold[0] if all(c == cold[0] for c in cold) else ~mask(cold)
    return Which(None if all(wanted) else mask(wanted), warm), left
