"""The loop that every low-rank optimizer shares; its three parts and the state are in ``protocols.py``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.ops import BACKENDS
from lowrank_optim.optim.checks import check_choice, check_positive_int, check_range
from lowrank_optim.optim.fused import fused_update_, fuses, measured_down
from lowrank_optim.optim.groups import as_groups
from lowrank_optim.optim.moments import STATE_DTYPES, slices
from lowrank_optim.optim.protocols import IDENTITY, UNSCALED, Group, Lift, Refresh, Rule, State, Subspace
from lowrank_optim.optim.storage import WEIGHT_ROUNDINGS, check_storable, init_storage, is_int8, writable

FORMAT_VERSION = 1
MOMENTS = ("keep", "align", "rotate")

# Options that every optimizer has, whether its constructor names them or only a group does.
COMMON = {"state_dtype": "float32", "weight_rounding": "nearest"}


class Explanation(NamedTuple):
    """What an optimizer does with one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    method: str
    reason: str


def refresh_due(state: State, group: Group) -> bool:
    """Whether the coming step refreshes the basis: steps 1, 1 + gap, 1 + 2 gap, ... of the parameter.

    With ``stagger`` the first is the same, the later ones are moved by a share of the gap that the golden
    ratio spreads evenly over the parameters. While a CUDA graph is being captured the answer is no.
    """
    step = state["step"]
    # A lazy subspace keeps a gap of its own.
    gap = state.get("gap", group["update_proj_gap"])
    if isinstance(step, Tensor):
        if step.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        # A synchronisation for every parameter: capturable steps belong into a graph, not here.
        step = int(step)
    offset = int(gap * (state["seed"] * 0.6180339887498949 % 1.0)) if group["stagger"] else 0
    return bool(step == 0 or (step + offset) % gap == 0)


class LowRankOptimizer(Optimizer):
    """Base of all optimizers here: a subclass names its subspace, rule and lift and declares its arguments.

    Args:
        params: tensors, named tensors, or groups; see :func:`lowrank_optim.optim.groups.as_groups`.
        defaults: every hyper-parameter of the method; those below are common to all.

            - lr, weight_decay: non-negative numbers; lr may be a one-element tensor.
            - rank: columns of the basis, or None for the full-rank rule.
            - update_proj_gap: updates from one refresh of the basis to the next.
            - stagger: spread the refreshes of the parameters over the gap.
            - moments: what becomes of the moments at a refresh: "keep" (as published), "align" (kept, the signs of the
              new basis' columns turned towards the old ones) or "rotate" (moved by the overlap of the bases).
            - state_dtype: how the moments are stored. "float32" (fp64 for fp64 parameters), "bfloat16" (rounded
              stochastically) or "int8" (bitsandbytes' blockwise format; moments of fewer than 4096 values stay
              fp32). The arithmetic is fp32 in each; complex moments stay as they are.
            - weight_rounding: how bfloat16 weights are written. "nearest" (in place), "stochastic" or "compensated"
              (an int8 correction beside the weight, 24 bits together); the latter two compute in fp32, in a copy of
              one weight at a time (kernels: without a copy). Weights of more bits are never rounded, so for them the
              option is without effect.
            - maximize: ascend.
            - capturable: keep the step counter on the device, so that a CUDA graph can replay the step.
              The graph never refreshes: run one step outside of it every update_proj_gap steps.
            - backend: None, "eager" or "triton"; see :func:`lowrank_optim.ops.pick`.

    Raises:
        ValueError: a hyper-parameter out of range, no parameters, a parameter in two groups.
    """

    subspace: Subspace
    rule: Rule
    lift: Lift
    # Where each authors' code has it: (1 - lr wd) W - update, or (1 - lr wd) (W - update).
    decay_first: bool = False
    # Wall time spent in refreshes. A class attribute, because Optimizer.__getstate__ keeps neither this
    # nor the set of warnings given.
    refresh_seconds: float = 0.0
    _warned: frozenset[str] = frozenset()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        groups, switched = as_groups(params)
        if switched:
            # Groups in the manner of the published packages: the key "rank" switches the method on.
            defaults = {**defaults, "rank": None}
        super().__init__(groups, {**COMMON, **defaults})
        self._warn_if_nothing_is_compressed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; hyper-parameters that it does not name take the constructor's values."""
        super().add_param_group(param_group)
        try:
            self._validate(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def _validate(self, group: Group) -> None:
        check_range("lr", group["lr"], low=0.0)
        check_range("weight_decay", group["weight_decay"], low=0.0)
        check_positive_int("rank", group["rank"], optional=True)
        check_positive_int("update_proj_gap", group["update_proj_gap"])
        check_choice("moments", group.get("moments", "keep"), MOMENTS)
        check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)
        check_choice("weight_rounding", group["weight_rounding"], WEIGHT_ROUNDINGS)
        check_choice("backend", group["backend"], BACKENDS)
        for p in group["params"]:
            check_storable(p, group["weight_rounding"])
        for part in (self.subspace, self.rule, self.lift):
            part.validate(group)

    def _warn_if_nothing_is_compressed(self) -> None:
        asked = [group for group in self.param_groups if group["rank"] is not None]
        params = [(p, group) for group in asked for p in group["params"]]
        if params and all(self.subspace_of(p, group) is IDENTITY for p, group in params):
            ranks = ", ".join(str(rank) for rank in sorted({group["rank"] for group in asked}))
            warnings.warn(
                f"{type(self).__name__}: rank={ranks} compresses no parameter, all get the full-rank rule; "
                "a matrix is compressed where its smaller side exceeds the rank",
                stacklevel=4,
            )

    def subspace_of(self, param: Tensor, group: Group) -> Subspace:
        """The subspace of one parameter; :data:`IDENTITY` where it gets the full-rank rule."""
        if group["rank"] is not None and self.subspace.compresses(param.shape, group):
            return self.subspace
        return IDENTITY

    def rule_of(self, subspace: Subspace) -> Rule:
        """The rule of the parameters in this subspace; those of :data:`IDENTITY` may have one of their own."""
        return self.rule

    def explain(self) -> list[Explanation]:
        """Which parameter gets which method and why, in the order of the groups."""
        rows: list[Explanation] = []
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if group["rank"] is None:
                    method, reason = "full-rank", "its group has no rank"
                elif self.subspace_of(p, group) is not IDENTITY:
                    method, reason = f"rank {group['rank']}", f"its smaller side exceeds {group['rank']}"
                elif p.ndim < 2:
                    method, reason = "full-rank", "fewer than two dimensions"
                else:
                    method, reason = "full-rank", f"its smaller side does not exceed {group['rank']}"
                name = group["param_names"][i] if "param_names" in group else f"param.{len(rows)}"
                rows.append(Explanation(name, tuple(p.shape), method, reason))
        return rows

    def init_state(self, param: Tensor, group: Group) -> State:
        """Create the state of one parameter; this only allocates, so it works on the meta device."""
        state: State = self.state[param]
        everyone = chain.from_iterable(g["params"] for g in self.param_groups)
        state["step"] = torch.zeros((), device=param.device) if group["capturable"] else 0
        state["seed"] = next(i for i, other in enumerate(everyone) if other is param)
        subspace = self.subspace_of(param, group)
        shape = subspace.init(param, state, group)
        self.rule_of(subspace).init(subspace.orient(param, state), shape, state, group)
        if subspace is not IDENTITY:
            self.lift.init(param, subspace, state, group)
        init_storage(param, state, group["weight_rounding"])
        return state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self._works_on_the_host():
            torch.compiler.disable(self._step_params)()  # type: ignore[no-untyped-call]
        else:
            self._step_params()
        return loss

    def _step_params(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_param(p, group)

    def _works_on_the_host(self) -> bool:
        """Whether the coming step allocates a state or renews a basis, of which a compiler makes little.

        Such a step runs as it is; those between are one graph, whatever the step and the value of a tensor lr.
        """
        pairs = ((p, group) for group in self.param_groups for p in group["params"] if p.grad is not None)
        return any(
            not self.state[p] or (self.subspace_of(p, group) is not IDENTITY and refresh_due(self.state[p], group))
            for p, group in pairs
        )

    @torch.no_grad()
    def step_param(self, param: Tensor, group: Group) -> None:
        """Update one parameter from its gradient, which is left as it is.

        A gradient with a NaN or an infinity counts as None: exactly so on the CPU and at a refresh; elsewhere (and
        under ``torch.compile``) its low-rank image counts as zero, because a look at it would make the host wait.
        """
        grad = param.grad
        if grad is None or grad.numel() == 0:
            return
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only, got {grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}: use nn.Embedding(sparse=False), or torch.optim.SparseAdam for it"
            )
        state: State = self.state[param] or self.init_state(param, group)
        subspace = self.subspace_of(param, group)
        grad = subspace.orient(grad, state)
        compressed = subspace is not IDENTITY
        grad = self.lift.before(grad, state, group) if compressed else grad
        if compressed and refresh_due(state, group) and not self._refresh(subspace, grad, state, group):
            return
        measures = getattr(self.lift, "measures", False)
        if compressed and measures and fuses(param, subspace, self.rule_of(subspace), self.lift, group):
            low, rows = measured_down(grad, subspace, state, group)
            self.step_low(param, low, group, grad=grad, row_norms=rows)
        else:
            self.step_low(param, subspace.down(grad, state, group), group, grad=grad)

    @torch.no_grad()
    def step_low(
        self, param: Tensor, low: Tensor, group: Group, *, grad: Tensor | None = None, row_norms: Tensor | None = None
    ) -> None:
        """Update one parameter, whose state exists, from its low-rank gradient.

        Args:
            low: as ``subspace.down`` returns it.
            grad: what ``low`` is the image of; None where no lift reads it.
            row_norms: its norms by row, where they are known.
        """
        state: State = self.state[param]
        subspace = self.subspace_of(param, group)
        compressed = subspace is not IDENTITY
        lift = self.lift if compressed else UNSCALED
        # NaN and infinity both survive summation; this reads a rank-sized tensor, not the gradient. Only float16 sums
        # need more range, for which the CPU makes a copy.
        finite = low.sum(dtype=torch.float32 if low.dtype == torch.float16 else None).isfinite()
        unseen = low.device.type != "cpu" or torch.compiler.is_compiling()
        if not unseen and not finite:
            self._warn_once("skipped an update because of a non-finite gradient")
            return
        state["step"] += 1
        measured = row_norms is not None or not getattr(lift, "measures", False)
        if compressed and measured and fuses(param, subspace, self.rule_of(subspace), lift, group):
            low = torch.where(finite, low, 0) if unseen else low
            fused_update_(self, param, grad, low, subspace, lift, state, group, row_norms=row_norms)
            return
        # A slice of an int8 weight would not know where its values are.
        if compressed or is_int8(param) or not getattr(self.rule_of(subspace), "elementwise", False):
            low = torch.where(finite, low, 0) if unseen else low
            grad = low.new_empty(0) if grad is None else grad
            with writable(param, state, group["weight_rounding"]) as weight:
                self.update_(subspace.orient(weight, state), grad, low, subspace, lift, state, group)
            return
        init_storage(param, state, group["weight_rounding"])
        for part, (values, slope) in slices(state, subspace.orient(param, state), low):
            masked = torch.where(finite, slope, 0) if unseen else slope
            with writable(values, part, group["weight_rounding"]) as weight:
                self.update_(weight, masked, masked, subspace, lift, part, group)

    def update_(
        self, target: Tensor, grad: Tensor, low: Tensor, subspace: Subspace, lift: Lift, state: State, group: Group
    ) -> None:
        """Direction, lift and decay of one parameter; ``state["step"]`` counts this update already."""
        rule = self.rule_of(subspace)
        alpha = self.step_size(rule, state, group)
        decays = group["weight_decay"] != 0
        if decays and self.decay_first:
            target.mul_(1 - group["lr"] * group["weight_decay"])
        in_one_pass = getattr(rule, "update_", None)
        if lift is UNSCALED and in_one_pass is not None:
            in_one_pass(target, low, state, group, alpha=alpha)
        else:
            direction = rule.direction(low, state, group)
            lift.apply_(target, grad, low, direction, subspace, state, group, alpha=alpha)
        if decays and not self.decay_first:
            target.mul_(1 - group["lr"] * group["weight_decay"])

    def step_size(self, rule: Rule, state: State, group: Group) -> float | Tensor:
        """What multiplies the lifted direction, bias correction and sign included."""
        size = group["lr"] * rule.correction(state["step"], group)
        # Every direction is odd in the gradient, so ascent is descent with the sign turned.
        signed: float | Tensor = size if group["maximize"] else -size
        return signed

    def _refresh(self, subspace: Subspace, grad: Tensor, state: State, group: Group) -> bool:
        """Renew the basis; False where there is no usable basis, so that the update must be skipped."""
        # aminmax, unlike abs(), makes no copy of the gradient.
        extremes = torch.aminmax(torch.view_as_real(grad) if grad.is_complex() else grad)
        largest = float(torch.stack(extremes).abs().amax())
        if not math.isfinite(largest):
            self._warn_once("skipped an update because of a non-finite gradient")
            return False
        start = time.perf_counter()
        # A zero gradient has no subspace: the basis stays, and a first refresh waits for another gradient.
        started = int(state["step"]) > 0
        renewed, overlap = subspace.refresh(grad, state, group) if largest > 0 else Refresh(renewed=False)
        if overlap is not None and started:
            self.rule_of(subspace).transport(state, overlap, group)
        self.refresh_seconds += time.perf_counter() - start
        if largest > 0 and not renewed:
            self._warn_once("kept an old basis because no new one could be computed")
        return renewed or started

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned |= {message}
            warnings.warn(f"{type(self).__name__} {message}; this is said once", RuntimeWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus ``format_version``; loads with ``torch.load(..., weights_only=True)``."""
        return {**super().state_dict(), "format_version": FORMAT_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's, every tensor keeps the dtype that it was saved with.

        Raises:
            ValueError: groups that do not fit, or a state written by a newer version.
        """
        version = state_dict.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(f"Invalid format_version: {version}, expected at most {FORMAT_VERSION}")
        saved: dict[str, Any] = {}

        # Hooks, not a copy of torch's method: the first runs after the user's own, the second before them.
        def take_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            saved.update(incoming)
            return {**incoming, "state": {}}

        def put_state(_: Optimizer) -> None:
            ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, param in zip(ids, params):
                if key in saved["state"]:
                    self.state[param] = {
                        name: value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else value
                        for name, value in saved["state"][key].items()
                    }

        handles = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
