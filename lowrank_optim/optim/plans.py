"""Which parameter gets which parts and which state: options, groups, plans."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.optim.groups import as_groups, check_flattened
from lowrank_optim.optim.options import ENGINE, VOLATILE, check_names, complete, expand_signature
from lowrank_optim.optim.parts import Group, Number, Option, Part, Parts, Rule, Slot, Slots, State, View
from lowrank_optim.optim.roles import HIDDEN, Role, describe
from lowrank_optim.optim.rules.adam import Adam
from lowrank_optim.optim.schema import allocate_, fit_
from lowrank_optim.optim.views import is_sharded, seed_of, view_of
from lowrank_optim.optim.weight_storage import check_storable, weight_slots

if TYPE_CHECKING:
    from lowrank_optim.optim.sharding import Layout, Shards


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
    """What was decided for a parameter: it holds until the parameter or an option of its group changes.

    view: of what a step works on, which of a sharded parameter is a part.
    layout: of a sharded parameter.
    """

    key: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    view: View
    parts: Parts
    slots: Slots
    state: State
    place: int
    layout: Layout | None


class PlannedOptimizer(Optimizer):
    """An optimizer that decides for every parameter which parts update it and what its state is."""

    # What a parameter gets that is compressed, and the parts that `parts` may choose in their place.
    triple: ClassVar[Parts]
    others: ClassVar[tuple[Part, ...]] = ()
    # The rule of parameters that are not compressed.
    full_rank: ClassVar[Rule] = Adam()
    # Options that the method itself reads, or narrows.
    options: ClassVar[Mapping[str, Option]] = {}
    # Where each authors' code has it: (1 - lr wd) W - update, or (1 - lr wd) (W - update).
    decay_first: ClassVar[bool] = False
    # Class attributes, because Optimizer.__getstate__ keeps none of these.
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
        # Within a step: whether its first refresh is still to come and will look, and what it found for those after it,
        # by place the largest magnitudes of their gradients.
        self._looks = False
        self._sizes: dict[int, list[float]] = {}
        # Refreshes of which only the device knows whether they went well.
        self._unread: list[tuple[State, Tensor]] = []
        self._checked: dict[int, tuple[Any, ...]] = {}
        super().__init__(groups, filled)
        self._warn_if_nothing_is_compressed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._checked, self._looks, self._sizes, self._unread = {}, {}, False, {}, []
        self._entries = None
        # Options that came after the optimizer was pickled.
        for name, option in self.known_options().items():
            self.defaults.setdefault(name, option.default)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

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
        # Not by way of its decorator, which imports torch's compiler: that takes longer than all else here.
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
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
        if group["state_dtype"] == "int4" and group["backend"] == "triton":
            raise ValueError("Invalid backend: 'triton' with state_dtype='int4', expected None or 'eager': no kernel")
        check_flattened(group["params"])
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
        return not is_sharded(param) and can_accumulate(self.parts_of(param, group), group)

    def slots_of(self, param: Tensor, group: Group) -> Slots:
        """Every tensor and number that the state of a parameter may hold: its schema, or this process' part of it."""
        view, parts = self._view_and_parts(param, group)
        slots, layout = self._slots(param, group, view, parts), self.layout(param, view, parts, group)
        return slots if layout is None else layout.slots(slots)

    def split(self, param: Tensor, group: Group, shards: Shards) -> tuple[View, Parts, Slots, Layout]:
        """What a parameter gets that is split in some way: its view, its parts, a process' slots and its layout."""
        from lowrank_optim.optim.sharding import layout_for

        view, parts = self._view_and_parts(param, group)
        layout = layout_for(shards, param.ndim, view, parts, group)
        return view, parts, layout.slots(self._slots(param, group, view, parts)), layout

    def layout(self, param: Tensor, view: View, parts: Parts, group: Group) -> Layout | None:
        """How a parameter is split over processes; None where it is a plain tensor."""
        if not is_sharded(param):
            return None
        from lowrank_optim.optim.sharding import layout_for, shards_of

        return layout_for(shards_of(param), param.ndim, view, parts, group)

    def _slots(self, param: Tensor, group: Group, view: View, parts: Parts) -> Slots:
        step = Slot((), torch.float32) if group["capturable"] else Number(0)
        entry = self.entry(param)
        slots: Slots = {"step": step, "seed": Number(seed_of(entry.name, entry.place))}
        subspace = parts.subspace
        if subspace is None:
            shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
            slots.update(parts.rule.slots(shape, view, group, "elements"))
        else:
            if subspace.refreshes:
                slots["waiting"] = Number(0)
            slots.update(subspace.slots(view, group))
            along = subspace.kept_axis(view, group) if parts.rule.rowwise else None
            slots.update(parts.rule.slots(subspace.low_shape(view, group), view, group, along))
            slots.update(parts.lift.slots(view, subspace.oriented_shape(view, group), group))
            if group["two_phase"] and self.accumulates(param, group):
                assert subspace.accumulation is not None
                slots.update(subspace.accumulation.slots(subspace, view, group))
        slots.update(weight_slots(param, group["weight_rounding"]))
        return slots

    def explain(self) -> list[Explanation]:
        """Which parameter gets which method and why, in the order of the groups.

        A state that was made for another rank and is rebuilt in the next step is reported as it is. Of a parameter that
        is split over processes it says how: see :class:`lowrank_optim.optim.sharding.Layout`.
        """
        rows: list[Explanation] = []
        for group in self.param_groups:
            for p in group["params"]:
                name = self.entry(p).name or f"param.{len(rows)}"
                method, reason = self._explain(p, group)
                layout = self.layout(p, *self._view_and_parts(p, group), group)
                reason = reason if layout is None else f"{reason}; over processes: {layout.split}"
                rows.append(Explanation(name, tuple(p.shape), method, reason))
        return rows

    def _explain(self, param: Tensor, group: Group) -> tuple[str, str]:
        view, parts = self._view_and_parts(param, group)
        if parts.subspace is None:
            if group["rank"] is None:
                role = self._role(param, group)
                return "full-rank", "its group has no rank" if role is None or role in HIDDEN else describe(role)
            if param.ndim < 2:
                return "full-rank", "fewer than two dimensions"
            return "full-rank", f"its smaller side does not exceed {group['rank']}"
        subspace = parts.subspace
        rank = subspace.rank(view.shape, group)
        present = self.state.get(param, {}).get("rank", rank)
        if present != rank:
            return f"rank {present}", f"its state has rank {present}; the next step rebuilds it with rank {rank}"
        method, limit = subspace.describe(view.shape, group), max(rank, 1)
        if view.kind == "matrix":
            return method, f"its smaller side exceeds {limit}"
        if view.kind == "stack":
            return method, f"a stack of {view.matrices} matrices whose smaller side exceeds {limit}"
        how = f"as a matrix {view.shape[0]} x {view.shape[1]}" if subspace.flattens else "along its long axes"
        return method, f"a convolution, compressed {how}"

    def init_state(self, param: Tensor, group: Group) -> State:
        """Create the state of one parameter; this only allocates, so it works on the meta device."""
        state: State = self.state[param]
        allocate_(state, self.slots_of(param, group), param.device)
        return state

    def _plan(self, param: Tensor, group: Group, key: tuple[Any, ...] | None) -> Plan:
        """The plan of a parameter, renewed with its state where anything that it depends on has changed."""
        plan = self._plans.get(param)
        if key is None:
            # While a compiler looks.
            if plan is not None:
                return plan
            key = self._key(group)
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
        slots, layout = self._slots(param, group, view, parts), self.layout(param, view, parts, group)
        if layout is not None:
            slots, view = layout.slots(slots), layout.view(view, param)
        if "step" not in state:
            # A wrapper may keep something of its own in there.
            allocate_(state, slots, param.device)
        elif fit_(state, slots, param.device, None if plan is None else plan.slots):
            self._warn_once("rebuilt the state of parameters because an option of their group has changed")
        plan = Plan(key, param.shape, param.dtype, view, parts, slots, state, self.entry(param).place, layout)
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

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned |= {message}
            warnings.warn(f"{type(self).__name__} {message} (warned once)", RuntimeWarning, stacklevel=4)

    def _name(self, param: Tensor) -> str:
        entry = self.entry(param)
        return entry.name or f"parameter {entry.place}"


def can_accumulate(parts: Parts, group: Group) -> bool:
    """Whether an update and a refresh can do with sums of projections instead of the whole gradient."""
    accumulation = None if parts.subspace is None else parts.subspace.accumulation
    return accumulation is not None and accumulation.works(group) and not parts.lift.reads_gradient(group)
