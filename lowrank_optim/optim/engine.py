"""The one step that every low-rank optimizer shares: groups, state, the schedule of refreshes, the update."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.ops.row_norms import row_norms
from lowrank_optim.optim.finite import verdict
from lowrank_optim.optim.full_rank import step_full_rank_
from lowrank_optim.optim.groups import as_groups
from lowrank_optim.optim.options import ENGINE, VOLATILE, check_names, complete, expand_signature
from lowrank_optim.optim.parts import (
    Group,
    Norms,
    Number,
    Option,
    Part,
    Parts,
    Refresh,
    Rule,
    Scalar,
    Slot,
    Slots,
    State,
    Step,
    View,
    Which,
)  # fmt: skip
from lowrank_optim.optim.roles import HIDDEN, Role, describe
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.schema import absent, allocate_, checked, fit_, match_names
from lowrank_optim.optim.views import as_matrices, seed_of, view_of
from lowrank_optim.optim.weight_storage import check_storable, weight_slots, write_

FORMAT_VERSION = 2
# Keys of a group that say something of each of its parameters.
OF_PARAMS = ("params", "param_names", "param_roles")


class Explanation(NamedTuple):
    """What an optimizer does with one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    method: str
    reason: str


class Entry(NamedTuple):
    """Where a parameter stands: its group, its number in there and over all groups, its name if it has one."""

    group: Group
    number: int
    place: int
    name: str | None


class Plan(NamedTuple):
    """What was decided for a parameter: it holds until the parameter or an option of its group changes."""

    key: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    view: View
    parts: Parts
    slots: Slots
    state: State
    place: int


class LowRankOptimizer(Optimizer):
    """Base of all optimizers here.

    A subclass names its parts and, in its constructor, its options::

        class GaLoreAdamW(LowRankOptimizer):
            triple = Parts(TopSingular(), Adam(), Plain())

            def __init__(self, params, lr=1e-3, ..., **common: Unpack[Common]):
                super().__init__(params, arguments(locals()))

    Args:
        params: tensors, named tensors, or groups; see :func:`lowrank_optim.optim.groups.as_groups`.
        defaults: options by name. What the parts and the engine read and ``defaults`` leaves out takes its declared
            default.

    Raises:
        TypeError: an option that no part reads, or a missing one without a default.
        ValueError: a value out of range, no parameters, a parameter in two groups, an unknown key in a group.
    """

    # What a parameter gets that is compressed, and the parts that `parts` may choose in their place.
    triple: ClassVar[Parts]
    others: ClassVar[tuple[Part, ...]] = ()
    # The rule of parameters that are not compressed.
    full_rank: ClassVar[Rule] = Adam()
    # Options that the method itself reads, or narrows.
    options: ClassVar[Mapping[str, Option]] = {}
    # Where each authors' code has it: (1 - lr wd) W - update, or (1 - lr wd) (W - update).
    decay_first: ClassVar[bool] = False
    # Wall time spent in refreshes. Class attributes, because Optimizer.__getstate__ keeps none of these.
    refresh_seconds: float = 0.0
    _warned: frozenset[str] = frozenset()
    _entries: dict[Tensor, Entry] | None = None
    # Called after a group was added.
    on_new_group: Callable[[Group], None] | None = None
    _read_key: Callable[[Group], tuple[Any, ...]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        expand_signature(cls)

    def __init__(self, params: Any, defaults: Mapping[str, Any]) -> None:
        groups, switched = as_groups(params)
        filled = complete(defaults, self.known_options(), type(self).__name__)
        if switched:
            # Groups in the manner of the published packages: the key "rank" switches the method on.
            filled["rank"] = None
        self._plans: dict[Tensor, Plan] = {}
        self._checked: dict[int, tuple[Any, ...]] = {}
        super().__init__(groups, filled)
        self._warn_if_nothing_is_compressed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._checked = {}, {}
        self._entries = None
        # Options that came after the optimizer was pickled.
        for name, option in self.known_options().items():
            self.defaults.setdefault(name, option.default)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # ---- options and groups ----

    @classmethod
    def known_options(cls) -> dict[str, Option]:
        """Every option that a group may have."""
        parts = (cls.full_rank, *(part for part in cls.triple if part is not None), *cls.others)
        known = dict(ENGINE)
        for part in parts:
            known.update(part.options)
        return {**known, **cls.options}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name take the constructor's values."""
        check_names(param_group, self.known_options(), type(self).__name__)
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        self._entries = None
        if self.on_new_group is not None:
            self.on_new_group(self.param_groups[-1])

    def check_group(self, group: Group) -> None:
        """Raise ValueError on a value that an option does not allow."""
        for name, option in self.known_options().items():
            option.check(name, group[name])
        for part in (*(part for part in self.triple if part is not None), *self.others):
            part.check(group)
        for p in group["params"]:
            check_storable(p, group["weight_rounding"])

    def _warn_if_nothing_is_compressed(self) -> None:
        asked = [group for group in self.param_groups if group["rank"] is not None]
        rows = [(p, group) for group in asked for p in group["params"]]
        if rows and all(self.parts_of(p, group).subspace is None for p, group in rows):
            ranks = ", ".join(str(rank) for rank in sorted({group["rank"] for group in asked}))
            warnings.warn(
                f"{type(self).__name__}: rank={ranks} compresses no parameter, all get the full-rank rule; "
                "a matrix is compressed where its smaller side exceeds the rank",
                stacklevel=4,
            )

    def entry(self, param: Tensor) -> Entry:
        """Where a parameter stands.

        Raises:
            KeyError: it is in no group.
        """
        if self._entries is None:
            self._entries = {}
            for group in self.param_groups:
                names = group.get("param_names")
                for number, p in enumerate(group["params"]):
                    name = None if names is None else names[number]
                    self._entries[p] = Entry(group, number, len(self._entries), name)
        return self._entries[param]

    # ---- what happens to one parameter ----

    def parts(self, view: View, group: Group) -> Parts:
        """The parts that a compressed parameter gets; a method with more than one triple chooses here."""
        return self.triple

    def _role(self, param: Tensor, group: Group) -> Role | None:
        roles = group.get("param_roles")
        return None if roles is None else roles[self.entry(param).number]

    def _view_and_parts(self, param: Tensor, group: Group) -> tuple[View, Parts]:
        view = view_of(param, self._role(param, group), group["rank"])
        if group["rank"] is not None:
            parts = self.parts(view, group)
            subspace = parts.subspace
            if subspace is not None:
                seen = view.as_matrix() if subspace.flattens else view
                if subspace.compresses(seen.shape, group):
                    return seen, parts
        return view, Parts(None, self.full_rank, self.triple.lift)

    def parts_of(self, param: Tensor, group: Group) -> Parts:
        """The parts of one parameter; its subspace is None where it gets the full-rank rule."""
        return self._view_and_parts(param, group)[1]

    def accumulates(self, param: Tensor, group: Group) -> bool:
        """Whether micro-batches of one parameter can be summed at low rank; see :func:`step_in_backward`."""
        return can_accumulate(self.parts_of(param, group), group)

    def slots_of(self, param: Tensor, group: Group) -> Slots:
        """Every tensor and number that the state of a parameter may hold: its schema."""
        return self._slots(param, group, *self._view_and_parts(param, group))

    def _slots(self, param: Tensor, group: Group, view: View, parts: Parts) -> Slots:
        step = Slot((), torch.float32) if group["capturable"] else Number(0)
        entry = self.entry(param)
        slots: Slots = {"step": step, "seed": Number(seed_of(entry.name, entry.place))}
        subspace = parts.subspace
        if subspace is None:
            shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
            slots.update(parts.rule.slots(shape, view, group, "elements"))
        else:
            slots["waiting"] = Number(0)
            slots.update(subspace.slots(view, group))
            along = subspace.kept_axis(view, group)
            slots.update(parts.rule.slots(subspace.low_shape(view, group), view, group, along))
            slots.update(parts.lift.slots(view, subspace.oriented_shape(view, group), group))
            if group["two_phase"] and can_accumulate(parts, group):
                assert subspace.accumulation is not None
                slots.update(subspace.accumulation.slots(subspace, view, group))
        slots.update(weight_slots(param, group["weight_rounding"]))
        return slots

    def explain(self) -> list[Explanation]:
        """Which parameter gets which method and why, in the order of the groups.

        A state that was made for another rank and is rebuilt in the next step is reported as it is.
        """
        rows: list[Explanation] = []
        for group in self.param_groups:
            for p in group["params"]:
                name = self.entry(p).name or f"param.{len(rows)}"
                rows.append(Explanation(name, tuple(p.shape), *self._explain(p, group)))
        return rows

    def _explain(self, param: Tensor, group: Group) -> tuple[str, str]:
        view, parts = self._view_and_parts(param, group)
        if group["rank"] is None:
            role = self._role(param, group)
            return "full-rank", "its group has no rank" if role is None or role in HIDDEN else describe(role)
        if parts.subspace is None:
            if param.ndim < 2:
                return "full-rank", "fewer than two dimensions"
            return "full-rank", f"its smaller side does not exceed {group['rank']}"
        subspace = parts.subspace
        rank = subspace.rank(view.shape, group)
        present = self.state.get(param, {}).get("rank", rank)
        if present != rank:
            return f"rank {present}", f"its state has rank {present}; the next step rebuilds it with rank {rank}"
        if view.kind == "matrix":
            return f"rank {rank}", f"its smaller side exceeds {rank}"
        if view.kind == "stack":
            return f"rank {rank}", f"a stack of {view.matrices} matrices whose smaller side exceeds {rank}"
        how = f"as a matrix {view.shape[0]} x {view.shape[1]}" if parts.subspace.flattens else "along its long axes"
        return f"rank {rank}", f"a convolution, compressed {how}"

    # ---- state ----

    def init_state(self, param: Tensor, group: Group) -> State:
        """Create the state of one parameter; this only allocates, so it works on the meta device."""
        state: State = self.state[param]
        allocate_(state, self.slots_of(param, group), param.device)
        return state

    def _plan(self, param: Tensor, group: Group, key: tuple[Any, ...] | None = None) -> Plan:
        """The plan of a parameter, renewed with its state where anything that it depends on has changed."""
        plan = self._plans.get(param)
        if torch.compiler.is_compiling() and plan is not None:
            return plan
        key = self._key(group) if key is None else key
        state = self.state[param]
        if plan is not None and plan.key == key and plan.state is state:
            if plan.shape == param.shape and plan.dtype is param.dtype and "step" in state:
                return plan
            if plan.shape != param.shape:
                raise RuntimeError(
                    f"The state of {self._name(param)} was made for the shape {tuple(plan.shape)}, and the parameter "
                    f"now has {tuple(param.shape)}: make a new optimizer, or delete optimizer.state[param]"
                )
        if self._checked.get(id(group)) != key:
            self.check_group(group)
            self._checked[id(group)] = key
        view, parts = self._view_and_parts(param, group)
        slots = self._slots(param, group, view, parts)
        if "step" not in state:
            # A wrapper may keep something of its own in there.
            allocate_(state, slots, param.device)
        elif fit_(state, slots, param.device, None if plan is None else plan.slots):
            self._warn_once("rebuilt the state of parameters because an option of their group has changed")
        plan = Plan(key, param.shape, param.dtype, view, parts, slots, state, self.entry(param).place)
        self._plans[param] = plan
        return plan

    def plan_of(self, param: Tensor, group: Group) -> Plan:
        """What was decided for a parameter, whose state exists from then on."""
        return self._plan(param, group, self._key(group))

    def _key(self, group: Group) -> tuple[Any, ...]:
        """What the plan of a group's parameters depends on."""
        if self._read_key is None:
            self._read_key = itemgetter(*(name for name in self.known_options() if name not in VOLATILE))
        return self._read_key(group)

    def _name(self, param: Tensor) -> str:
        entry = self.entry(param)
        return entry.name or f"parameter {entry.place}"

    # ---- the step ----

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
        with without_autocast():
            for group in self.param_groups:
                key = None if torch.compiler.is_compiling() else self._key(group)
                for p in group["params"]:
                    if p.grad is not None:
                        self.update_param(p, p.grad, group, key)

    def _works_on_the_host(self) -> bool:
        """Whether the coming step allocates a state or renews a basis, of which a compiler makes little.

        Such a step runs as it is; those between are one graph, whatever the step and the value of a tensor lr.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                plan = self._plans.get(p)
                if plan is None or (plan.parts.subspace is not None and refresh_due(plan.state, group, plan.place)):
                    return True
        return False

    @torch.no_grad()
    def step_param(self, param: Tensor, group: Group) -> None:
        """Update one parameter from its gradient, which is left as it is.

        What becomes of a gradient with a NaN or an infinity stands in :mod:`lowrank_optim.optim.finite`.
        """
        if param.grad is not None:
            with without_autocast():
                self.update_param(param, param.grad, group, self._key(group))

    @torch.no_grad()
    def step_low(self, param: Tensor, low: Tensor, group: Group) -> None:
        """Update one parameter, whose state exists, from its low-rank gradient alone; the lift must not read more."""
        with without_autocast():
            self._step_low(self.plan_of(param, group), param, low, None, group)

    def update_param(self, param: Tensor, grad: Tensor, group: Group, key: tuple[Any, ...] | None) -> None:
        """The step of one parameter; ``key`` is what :meth:`step` has computed once for the group."""
        if grad.numel() == 0:
            return
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only, got {grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}: use nn.Embedding(sparse=False), or torch.optim.SparseAdam for it"
            )
        plan = self._plan(param, group, key)
        subspace, state = plan.parts.subspace, plan.state
        if subspace is None:
            self._step_full_rank(plan, param, grad, group)
            return
        grad = subspace.orient(as_matrices(grad, plan.view), state)
        grad = plan.parts.lift.before(grad, state, group)
        if refresh_due(state, group, plan.place):
            is_scheduled = scheduled(state, group, plan.place)
            if not self.refresh(plan, grad, group, is_scheduled=is_scheduled):
                return
        self._step_low(plan, param, subspace.project(grad, state, group), grad, group)

    def _step_low(self, plan: Plan, param: Tensor, low: Tensor, grad: Tensor | None, group: Group) -> None:
        (subspace, rule, lift), state = plan.parts, plan.state
        assert subspace is not None
        ok = self._admit(low if grad is None or subspace.sees_all(group) else grad)
        if ok is False:
            return
        if isinstance(ok, Tensor):
            low = torch.where(ok, low, rule.missing(low, state, group))
        state["step"] += 1
        size, decay = self.step_size(plan, param, group)
        norms = None
        if lift.needs_norms and grad is not None:
            of_low = torch.empty(2, *low.shape[:-1], dtype=low.dtype.to_real(), device=low.device)
            direction = rule.direction(low, state, group, of_low)
            of_grad = row_norms(grad)
            if isinstance(ok, Tensor):
                # In a stack the other matrices must not move either.
                of_grad = torch.where(ok, of_grad, torch.inf)
            norms = Norms(of_low[0].unsqueeze(-1), of_low[1].unsqueeze(-1), of_grad)
        else:
            direction, size = self.direction(rule, low, state, group, size)
        # What is read of a weight here is its shape and dtype: that of an int8 weight has no values.
        weight = subspace.orient(as_matrices(param, plan.view), state)
        step = Step(weight if grad is None else grad, low, direction, norms, ok, subspace)
        update = lift.update(step, state, group)
        basis = None
        if update.low is not None:
            if subspace.factored:
                basis = subspace.basis(weight, state, group)
            else:
                update = expand(update, step, state, group)
        sign = 1.0 if group["maximize"] else -1.0
        write_(
            param, plan.view, update, step.grad, basis, state, group,
            size=size * sign, decay=decay, decay_first=self.decay_first,
        )  # fmt: skip
        lift.after(step, state, group)

    def _step_full_rank(self, plan: Plan, param: Tensor, grad: Tensor, group: Group) -> None:
        ok = self._admit(grad)
        if ok is False:
            return
        state, rule = plan.state, plan.parts.rule
        state["step"] += 1
        size, decay = self.step_size(plan, param, group)
        sign = 1.0 if group["maximize"] else -1.0
        step_full_rank_(self, param, grad, rule, state, group, ok, size=size, sign=sign, decay=decay)

    def _admit(self, tensor: Tensor) -> bool | Tensor:
        ok = verdict(tensor)
        if ok is False:
            self._warn_once("skipped an update because of a non-finite gradient")
        return ok

    # ---- what methods may replace ----

    def step_size(self, plan: Plan, param: Tensor, group: Group) -> tuple[Scalar, Scalar]:
        """The size of the step, bias correction included, and what decay leaves of the weight."""
        lr = group["lr"]
        return lr * plan.parts.rule.correction(plan.state["step"], group), self.kept_by_decay(lr, group)

    def kept_by_decay(self, lr: Scalar, group: Group) -> Scalar:
        """1 - lr weight_decay."""
        return 1.0 if group["weight_decay"] == 0 else 1 - lr * group["weight_decay"]

    def direction(self, rule: Rule, low: Tensor, state: State, group: Group, size: Scalar) -> tuple[Tensor, Scalar]:
        """The direction, and the step size that it is still to be multiplied with."""
        return rule.direction(low, state, group), size

    def add_direction_(
        self, target: Tensor, rule: Rule, grad: Tensor, state: State, group: Group, size: Scalar, sign: float
    ) -> None:
        """target += sign * size * direction(grad), for a parameter that is not compressed."""
        rule.add_direction_(target, grad, state, group, alpha=sign * size)

    def finish_(self, target: Tensor, group: Group) -> None:
        """Act on the new value of a parameter that is not compressed, before it is rounded."""

    # ---- refreshes ----

    def refresh(self, plan: Plan, grad: Tensor, group: Group, *, is_scheduled: bool) -> bool:
        """Renew the bases of a parameter, or of those matrices that wait for one; False to skip the update.

        A zero gradient has no subspace: its matrix keeps its basis, or waits for another gradient.
        """
        subspace, state = plan.parts.subspace, plan.state
        assert subspace is not None
        start = time.perf_counter()
        sizes = largest(grad, plan.view.batch)
        if not all(size < float("inf") for size in sizes):
            self._warn_once("skipped an update because of a non-finite gradient")
            return False
        started = int(state["step"]) > 0
        which, waiting = select_matrices(subspace, sizes, plan, grad.device, is_scheduled)
        state["waiting"] = waiting
        if which is None:
            return True
        result = subspace.refresh(grad, state, group, which)
        self.transport(plan, result, group)
        if not result.renewed:
            self._warn_once("kept an old basis because no new one could be computed")
        self.refresh_seconds += time.perf_counter() - start
        return result.renewed or started

    def transport(self, plan: Plan, result: Refresh, group: Group) -> None:
        """Move the moments into a new basis."""
        if result.overlap is not None and int(plan.state["step"]) > 0:
            plan.parts.rule.transport(plan.state, result.overlap, group)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned |= {message}
            warnings.warn(f"{type(self).__name__} {message} (warned once)", RuntimeWarning, stacklevel=4)

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus ``format_version``; loads with ``torch.load(..., weights_only=True)``.

        The keys of a parameter's state are always the same: what is absent at the moment is there as zeros on the CPU.
        """
        saved = super().state_dict()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        state = {}
        for key, param in zip(ids, params):
            if key in saved["state"]:
                slots = self.slots_of(param, self.entry(param).group)
                state[key] = saved["state"][key] | absent(self.state[param], slots)
        state.update((key, value) for key, value in saved["state"].items() if key not in state)
        return {**saved, "state": state, "format_version": FORMAT_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; by name where both sides have names, else by position.

        Unlike torch's, it keeps the dtype that every tensor was saved with, unless the parameter's dtype has changed.

        Raises:
            ValueError: a state of another optimizer, of other shapes or names, or of a newer version. Nothing has been
                loaded then.
        """
        version = state_dict.get("format_version", 1)
        if version > FORMAT_VERSION:
            raise ValueError(f"Invalid format_version: {version}, expected at most {FORMAT_VERSION}")
        loaded: dict[Tensor, State] = {}

        # Hooks, not a copy of torch's method: the first runs after the user's own, the second before them.
        def take_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            groups = self._checked_groups(incoming)
            for group, ids in zip(groups, match_names(self.param_groups, incoming["param_groups"])):
                for p, key in zip(group["params"], ids):
                    if key in incoming["state"]:
                        entry = incoming["state"][key]
                        loaded[p] = checked(entry, self.slots_of(p, group), self._name(p), p.device)
            renamed = [
                {**saved, **{key: group[key] for key in ("param_names", "param_roles") if key in group}}
                for saved, group in zip(incoming["param_groups"], self.param_groups)
            ]
            return {**incoming, "param_groups": renamed, "state": {}}

        def put_state(_: Optimizer) -> None:
            self._plans.clear()
            self._checked.clear()
            self._entries = None
            self.state.update(loaded)
            for group in self.param_groups:
                for name, value in self.defaults.items():
                    group.setdefault(name, value)
                for p in group["params"]:
                    if p in loaded:
                        self.plan_of(p, group)

        handles = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked_groups(self, state_dict: dict[str, Any]) -> list[Group]:
        """The groups as they will be: ours with the saved options; torch itself compares their number and sizes."""
        groups = []
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            options = {key: value for key, value in saved.items() if key not in OF_PARAMS}
            try:
                check_names(options, self.known_options(), type(self).__name__)
            except ValueError as error:
                raise ValueError(f"Invalid state_dict: group {i} belongs to another optimizer: {error}") from error
            if options.get("rank", group["rank"]) != group["rank"]:
                self._warn_once(f"took rank={options['rank']} from the loaded state in place of {group['rank']}")
            groups.append({**group, **options})
            try:
                self.check_group(groups[-1])
            except ValueError as error:
                raise ValueError(f"Invalid state_dict: group {i} has an option out of range: {error}") from error
        return groups


def refresh_due(state: State, group: Group, place: int) -> bool:
    """Whether the coming step refreshes the basis: it is scheduled, or matrices wait for one.

    While a CUDA graph is being captured the answer is no.
    """
    step = state["step"]
    if isinstance(step, Tensor) and step.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(state["waiting"]) or scheduled(state, group, place)


def scheduled(state: State, group: Group, place: int) -> bool:
    """Whether the coming step is one of 1, 1 + gap, 1 + 2 gap, ... of the parameter.

    With ``stagger`` the first is the same, the later ones are moved by a share of the gap that the golden ratio spreads
    evenly over the places of the parameters.
    """
    # A tensor is read from the device: a capturable step should run inside of a CUDA graph, where nothing is due.
    step = int(state["step"])
    # A lazy subspace keeps a gap of its own.
    gap: int = state["gap"] if "gap" in state else group["update_proj_gap"]
    offset = int(gap * (place * 0.6180339887498949 % 1.0)) if group["stagger"] else 0
    return bool(step == 0 or (step + offset) % gap == 0)


def largest(grad: Tensor, batch: tuple[int, ...]) -> list[float]:
    """The largest magnitude in every matrix of a batch, NaN where one is; reads them from the device at once."""
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    values = values.reshape(*batch, -1) if batch else values
    if batch:
        extremes = torch.stack((values.amax(-1), values.amin(-1)))
    else:
        # Unlike abs(), aminmax makes no copy of the gradient.
        extremes = torch.stack(torch.aminmax(values))
    sizes: list[float] = extremes.abs().amax(0).view(-1).tolist()
    return sizes


def select_matrices(
    subspace: Any, sizes: list[float], plan: Plan, device: torch.device, is_scheduled: bool
) -> tuple[Which | None, int]:
    """The matrices that a refresh is about, None for none, and those that wait after it, as the bits of an int."""
    waiting = plan.state["waiting"]
    if is_scheduled and int(plan.state["step"]) == 0:
        waiting = (1 << len(sizes)) - 1
    if not subspace.follows_gradient:
        return Which(warm=int(plan.state["step"]) > 0), 0
    wanted = [size > 0 and (is_scheduled or waiting >> i & 1 == 1) for i, size in enumerate(sizes)]
    cold = [waiting >> i & 1 == 1 for i in range(len(sizes))]
    left = sum(1 << i for i, (is_cold, gets) in enumerate(zip(cold, wanted)) if is_cold and not gets)
    if not any(wanted):
        return None, left

    def mask(flags: list[bool]) -> Tensor:
        return torch.tensor(flags, device=device).view(*plan.view.batch, 1, 1)

    warm = not cold[0] if all(c == cold[0] for c in cold) else ~mask(cold)
    return Which(None if all(wanted) else mask(wanted), warm), left


def expand(update: Any, step: Step, state: State, group: Group) -> Any:
    """An update of a subspace without a basis, as a full-size matrix."""
    full = torch.zeros(step.grad.shape, dtype=step.low.dtype, device=step.grad.device)
    step.subspace.project_back_(full, update.low, state, group, alpha=update.scale)
    if update.row_scale is not None:
        full.addcmul_(step.grad.to(full.dtype), update.row_scale)
    return update._replace(low=None, full=full)


def can_accumulate(parts: Parts, group: Group) -> bool:
    """Whether an update and a refresh can do with sums of projections instead of the whole gradient."""
    accumulation = None if parts.subspace is None else parts.subspace.accumulation
    return accumulation is not None and accumulation.works(group) and not parts.lift.reads_gradient(group)


@contextmanager
def without_autocast() -> Iterator[None]:
    """The caller's autocast does not reach the step."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
