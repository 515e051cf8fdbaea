"""The one step that every low-rank optimizer shares, and how its state is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.ops.project import project
from lowrank_optim.ops.row_norms import row_norms
from lowrank_optim.optim import finite
from lowrank_optim.optim.finite import is_finite, verdict
from lowrank_optim.optim.full_rank import step_full_rank_
from lowrank_optim.optim.options import check_names
from lowrank_optim.optim.parts import Group, Norms, Refresh, Rule, Scalar, State, Step, Update
from lowrank_optim.optim.plans import Plan, PlannedOptimizer
from lowrank_optim.optim.schedule import largest, refresh_due, scheduled, select_matrices
from lowrank_optim.optim.schema import absent, checked, match_names
from lowrank_optim.optim.state_storage import recoded
from lowrank_optim.optim.views import as_matrices, sharded_class
from lowrank_optim.optim.weight_storage import write_

if TYPE_CHECKING:
    from lowrank_optim.optim.sharding import Layout

FORMAT_VERSION = 2
# Keys of a group that say something of each of its parameters.
OF_PARAMS = ("params", "param_names", "param_roles")


class LowRankOptimizer(PlannedOptimizer):
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

    # Wall time spent in refreshes.
    refresh_seconds: float = 0.0

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
            # A compiled step is a blind one, and torch before 2.13 compiles no new attribute of an optimizer.
            eager = not torch.compiler.is_compiling()
            if eager:
                self._looks, self._sizes = True, {}
            agreed = self._agree(chain.from_iterable(group["params"] for group in self.param_groups))
            for group in self.param_groups:
                key = self._key(group) if eager else None
                for p in group["params"]:
                    if p.grad is not None:
                        self.update_param(p, p.grad, group, key, agreed.get(p) if agreed else None)
            if eager:
                self._looks = False

    def _look(self) -> None:
        """Read at once what all refreshes of this step want to know of the device, and how the last ones ended.

        Not where the host looks anyway or steps are counted on the device, nor of a gradient that the lift changes.
        """
        self._looks = False
        due = []
        for group in self.param_groups:
            if group["capturable"]:
                continue
            for p in group["params"]:
                plan = self._plans.get(p)
                if plan is None or p.grad is None or p.grad.layout is not torch.strided or p.grad.numel() == 0:
                    continue
                # Of a parameter that is split over processes the sizes are agreed on.
                if plan.layout is not None or finite.host_looks(p.device):
                    continue
                subspace, _, lift = plan.parts
                if subspace is not None and not lift.changes_gradient and refresh_due(plan.state, group, plan.place):
                    grad = subspace.orient(as_matrices(p.grad, plan.view), plan.state)
                    due.append((plan.place, largest(grad, plan.view.batch)))
        if not due:
            return
        unread, self._unread = self._unread, []
        found = [sizes for _, sizes in due] + [renewed.view(-1) for _, renewed in unread]
        values = torch.cat([one.to(found[0].device, torch.float64) for one in found]).tolist()
        parts = [values[end - len(one) : end] for one, end in zip(found, accumulate(map(len, found)))]
        self._sizes = {place: sizes for (place, _), sizes in zip(due, parts)}
        for (state, _), renewed in zip(unread, parts[len(due) :]):
            # What was not renewed starts anew, as a matrix without a basis does.
            missed = sum(1 << i for i, good in enumerate(renewed) if not good)
            if missed:
                state["waiting"] |= missed
                self._warn_once("kept an old basis because no new one could be computed")

    def _agree(self, params: Iterable[Tensor]) -> dict[Tensor, bool | Tensor]:
        """The verdicts on the gradients of sharded parameters, in which no process must differ."""
        kind = sharded_class()
        if kind is None:
            return {}
        sharded = [(p, p.grad) for p in params if isinstance(p, kind) and p.grad is not None]
        if not sharded:
            return {}
        from lowrank_optim.optim.sharding import agree

        return agree(sharded)

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
                ok = self._agree([param]).get(param)
                self.update_param(param, param.grad, group, self._key(group), ok)

    @torch.no_grad()
    def step_low(self, param: Tensor, low: Tensor, group: Group) -> None:
        """Update one parameter, whose state exists, from its low-rank gradient alone; the lift must not read more."""
        with without_autocast():
            self._step_low(self.plan_of(param, group), param, low, None, group)

    def update_param(
        self, param: Tensor, grad: Tensor, group: Group, key: tuple[Any, ...] | None, ok: bool | Tensor | None = None
    ) -> None:
        """The step of one parameter.

        Args:
            key: what :meth:`step` has computed once for the group.
            ok: the verdict on the gradient, where it is known.
        """
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only, got {grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}: use nn.Embedding(sparse=False), or torch.optim.SparseAdam for it"
            )
        if grad.numel() == 0:
            return
        plan = self._plan(param, group, key)
        if plan.layout is None:
            self._update(plan, param, grad, group, ok)
        elif self._admit(grad, ok) is not False:
            with plan.layout.opened(param, grad) as (weight, slope):
                self._update(plan, weight, slope, group, ok)

    def _update(self, plan: Plan, param: Tensor, grad: Tensor, group: Group, ok: bool | Tensor | None) -> None:
        (subspace, _, lift), state = plan.parts, plan.state
        if subspace is None:
            self._step_full_rank(plan, param, grad, group, ok)
            return
        grad = lift.before(subspace.orient(as_matrices(grad, plan.view), state), state, group)
        if refresh_due(state, group, plan.place):
            is_scheduled = scheduled(state, group, plan.place)
            if not self.refresh(plan, grad, group, is_scheduled=is_scheduled):
                return
        basis = of_grad = None
        if plan.layout is not None:
            low = self.project_part(plan, plan.layout, grad, group)
        elif subspace.makes_basis(group):
            basis = subspace.basis(grad, state, group)
            low = project(grad, basis)
        elif lift.needs_norms:
            low, of_grad = subspace.project_and_measure(grad, state, group)
        else:
            low = subspace.project(grad, state, group)
        self._step_low(plan, param, low, grad, group, ok, basis, of_grad)

    def project_part(self, plan: Plan, layout: Layout, grad: Tensor, group: Group) -> Tensor:
        """The low-rank gradient, of which a process has all rows or, where the rule is content with them, its own."""
        (subspace, rule, _), state = plan.parts, plan.state
        assert subspace is not None
        if layout.split == "whole":
            return subspace.project(grad, state, group)
        if layout.split == "columns":
            basis = layout.part_of_basis(subspace.basis(layout.like(grad, state), state, group))
            return layout.shards.sum_(project(grad, basis))
        low = subspace.project(grad, state, group)
        return low if rule.rowwise else layout.shards.gather(low, low.ndim - 2)

    def _step_low(
        self, plan: Plan, param: Tensor, low: Tensor, grad: Tensor | None, group: Group,
        ok: bool | Tensor | None = None, basis: Tensor | None = None, of_grad: Tensor | None = None,
    ) -> None:  # fmt: skip
        (subspace, rule, lift), state, layout = plan.parts, plan.state, plan.layout
        assert subspace is not None
        if of_grad is None and lift.needs_norms and grad is not None:
            of_grad = row_norms(grad)
        if of_grad is not None and layout is not None and layout.split == "columns":
            of_grad = layout.shards.sum_(of_grad.square_()).sqrt_()
        # They tell it as well as a sum.
        seen = of_grad
        if seen is None:
            seen = low if grad is None or subspace.sees_all(group) else grad
        if ok is None and seen is of_grad and not finite.host_looks(low.device):
            ok = of_grad
        else:
            ok = self._admit(seen, ok)
            if ok is False:
                return
            if of_grad is not None and isinstance(ok, Tensor):
                # No process knows the norms of all rows.
                of_grad = torch.where(is_finite(ok), of_grad, torch.inf)
        if (lift.reads_low or not rule.masks) and isinstance(ok, Tensor):
            low = torch.where(is_finite(ok), low, rule.missing(low, state, group))
        state["step"] += 1
        size, decay = self.step_size(plan, param, group)
        # What is read of a weight here is its shape and dtype: that of a quantized weight has no values.
        weight = grad
        if weight is None or weight.dtype != param.dtype:
            weight = subspace.orient(as_matrices(param, plan.view), state)
        told: dict[str, Any] = {"ok": ok} if rule.masks else {}
        if of_grad is not None:
            of_low = torch.empty(2, *low.shape[:-1], dtype=low.dtype.to_real(), device=low.device)
            direction = rule.direction(low, state, group, of_low, **told)
            norms: Norms | None = Norms(of_low, of_grad)
        else:
            if rule.masks and lift.passes_direction and subspace.factored:
                # A refresh may still want sums over micro-batches.
                told |= {"dtype": weight.dtype, "spent": grad is not None}
            direction, size = self.direction(rule, low, state, group, size, **told)
            norms = None
        grad = weight if grad is None else grad
        sums = None
        shape: tuple[int, ...] = weight.shape
        if layout is not None and layout.split != "whole":
            if layout.split == "rows":
                sums = layout.shards
                if not rule.rowwise:
                    low, direction = (sums.take(some, some.ndim - 2) for some in (low, direction))
            weight = layout.like(weight, state)
            shape = layout.shape(weight.shape)
        step = Step(grad, low, direction, norms, ok, subspace, shape, sums)
        update = lift.update(step, state, group)
        if update.low is None:
            basis = None
        elif not subspace.factored:
            update = update._replace(low=None, full=expand(update.low, update, step, state, group))
        elif basis is None or basis.dtype != weight.dtype:
            basis = subspace.basis(weight, state, group)
            if layout is not None and layout.split == "columns":
                basis = layout.part_of_basis(basis)
        sign = 1.0 if group["maximize"] else -1.0
        write_(
            param, plan.view, update, step.grad, basis, state, group,
            size=size * sign, decay=decay, decay_first=self.decay_first,
        )  # fmt: skip
        lift.after(step, state, group)

    def _step_full_rank(self, plan: Plan, param: Tensor, grad: Tensor, group: Group, ok: bool | Tensor | None) -> None:
        state, rule = plan.state, plan.parts.rule
        # Where nobody looks, values that are updated each for itself are looked at one by one.
        ok = True if rule.elementwise and not finite.host_looks(grad.device) else self._admit(grad, ok)
        if ok is False:
            return
        state["step"] += 1
        size, decay = self.step_size(plan, param, group)
        sign = 1.0 if group["maximize"] else -1.0
        step_full_rank_(self, param, grad, rule, state, group, ok, size=size, sign=sign, decay=decay)

    def _admit(self, tensor: Tensor, ok: bool | Tensor | None) -> bool | Tensor:
        ok = verdict(tensor) if ok is None else ok
        if ok is False:
            self._warn_once("skipped an update because of a non-finite gradient")
        return ok

    def step_size(self, plan: Plan, param: Tensor, group: Group) -> tuple[Scalar, Scalar]:
        """The size of the step, bias correction included, and what decay leaves of the weight."""
        lr = group["lr"]
        return lr * plan.parts.rule.correction(plan.state["step"], group), self.kept_by_decay(lr, group)

    def kept_by_decay(self, lr: Scalar, group: Group) -> Scalar:
        """1 - lr weight_decay."""
        return 1.0 if group["weight_decay"] == 0 else 1 - lr * group["weight_decay"]

    def direction(
        self, rule: Rule, low: Tensor, state: State, group: Group, size: Scalar, **told: Any
    ) -> tuple[Tensor, Scalar]:
        """The direction, and the step size that it is still to be multiplied with.

        Args:
            told: what a rule that ``masks`` also takes.
        """
        return rule.direction(low, state, group, **told), size

    def add_direction_(
        self, target: Tensor, rule: Rule, grad: Tensor, state: State, group: Group, size: Scalar, sign: float
    ) -> None:
        """target += sign * size * direction(grad), for a parameter that is not compressed."""
        rule.add_direction_(target, grad, state, group, alpha=sign * size)

    def finish_(self, target: Tensor, group: Group) -> None:
        """Act on the new value of a parameter that is not compressed, before it is rounded."""

    def refresh(self, plan: Plan, grad: Tensor, group: Group, *, is_scheduled: bool) -> bool:
        """Renew the bases of a parameter, or of those matrices that wait for one; False to skip the update.

        A zero gradient has no subspace: its matrix keeps its basis, or waits for another gradient.
        """
        subspace, state = plan.parts.subspace, plan.state
        assert subspace is not None
        start = time.perf_counter()
        sums, layout = None, plan.layout
        if self._looks:
            self._look()
        sizes = self._sizes.pop(plan.place, None)
        if layout is not None and layout.split == "rows" and subspace.refreshes_rows:
            sums, sizes = layout.shards, layout.largest(grad, plan.view.batch)
        else:
            grad = grad if layout is None else layout.whole_grad(grad)
            sizes = largest(grad, plan.view.batch).tolist() if sizes is None else sizes
        if not all(size < float("inf") for size in sizes):
            self._warn_once("skipped an update because of a non-finite gradient")
            return False
        started = int(state["step"]) > 0
        which, waiting = select_matrices(subspace, sizes, plan.view, state, grad.device, is_scheduled)
        state["waiting"] = waiting
        if which is None:
            return True
        result = subspace.refresh(grad, state, group, which._replace(sums=sums))
        self.transport(plan, result, group)
        renewed = result.renewed
        if isinstance(renewed, Tensor):
            self._unread.append((state, renewed))
            renewed = True
        elif not renewed:
            self._warn_once("kept an old basis because no new one could be computed")
        self.refresh_seconds += time.perf_counter() - start
        return renewed or started

    def transport(self, plan: Plan, result: Refresh, group: Group) -> None:
        """Move the moments into a new basis."""
        if result.overlap is not None:
            plan.parts.rule.transport(plan.state, result.overlap, group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus ``format_version``; loads with ``torch.load(..., weights_only=True)``.

        The keys of a parameter's state are always the same: what is absent at the moment is there as zeros on the CPU.
        A state that an option of its group no longer fits is rebuilt now, as its next step would.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        for param in params:
            if param in self.state:
                self.plan_of(param, self.entry(param).group)
        saved = super().state_dict()
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        state = dict(saved["state"])
        for key, param in zip(ids, params):
            if key in state:
                group = self.entry(param).group
                view, parts = self._view_and_parts(param, group)
                slots, layout = self._slots(param, group, view, parts), self.layout(param, view, parts, group)
                state[key] = state[key] | absent(self.state[param], slots)
                if layout is not None:
                    state[key] = layout.wrap(state[key], slots)
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
            sizes = [[len(group["params"]) for group in side] for side in (self.param_groups, incoming["param_groups"])]
            if sizes[0] != sizes[1]:
                # torch says so.
                return incoming
            groups = self._checked_groups(incoming)
            for group, ids in zip(groups, match_names(self.param_groups, incoming["param_groups"])):
                for p, key in zip(group["params"], ids):
                    if key in incoming["state"]:
                        loaded[p] = self._load_one(p, group, incoming["state"][key])
            renamed = [
                {**saved, **{key: group[key] for key in ("param_names", "param_roles") if key in group}}
                for saved, group in zip(incoming["param_groups"], self.param_groups)
            ]
            return {**incoming, "param_groups": renamed, "state": {}}

        def put_state(_: Optimizer) -> None:
            # Torch has called __setstate__, which forgot the plans and completed the groups.
            self.state.update(loaded)
            for group in self.param_groups:
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

    def _load_one(self, param: Tensor, group: Group, saved: State) -> State:
        view, parts = self._view_and_parts(param, group)
        slots, layout = self._slots(param, group, view, parts), self.layout(param, view, parts, group)
        if layout is not None:
            saved, slots = layout.unwrap(saved, slots), layout.slots(slots)
        return checked(recoded(saved, slots), slots, self._name(param), param.device)

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


def expand(low: Tensor, update: Update, step: Step, state: State, group: Group) -> Tensor:
    """An update of a subspace without a basis as a full-size matrix."""
    full = torch.zeros(step.grad.shape, dtype=step.low.dtype, device=step.grad.device)
    step.subspace.project_back_(full, low, state, group, alpha=update.scale)
    if update.row_scale is not None:
        full.addcmul_(step.grad.to(full.dtype), update.row_scale)
    return full


@contextmanager
def without_autocast() -> Iterator[None]:
    """The caller's autocast does not reach the step."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
