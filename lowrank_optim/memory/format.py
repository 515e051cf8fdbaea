"""What estimate, simulate, measure and plan print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from lowrank_optim.memory.estimate import Estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import Measured
from lowrank_optim.memory.plan import (
    CONTEXT,
    COST_MODEL,
    FRAGMENTATION,
    Found,
    Plan,
    available,
    command_line,
    needed,
)
from lowrank_optim.memory.tracker import Peak
from lowrank_optim.pretrain.optimizers import parse_optimizer_args
from lowrank_optim.pretrain.report import table

UNITS = "GB = 10^9 bytes, GiB = 2^30 bytes"
_HEAD = f"{'':24}{'bytes':>20}{'GB':>10}{'GiB':>10}"


def estimated(result: Estimate) -> str:
    """An estimate by category and by state key."""
    share = 100 * result.low_rank_parameters / result.parameters
    layers = f" as {_call(result.parameterization, result.parameterization_args)}" if result.parameterization else ""
    lines = [
        f"{result.model}{layers}, {_call(result.optimizer, result.optimizer_args)}, {result.dtype}, "
        f"states in {result.state_dtype}",
        f"{result.parameters:,} parameters, {result.low_rank_parameters:,} of them low-rank ({share:.1f} %)",
        "",
        _HEAD,
    ]
    for category, size in result.by_category.items():
        if category in result.not_included:
            lines.append(f"{category:24}{'not estimated':>20}")
            continue
        lines.append(_line(category, size))
        if category == "weights" and result.index_bytes:
            lines.append(_line("  of which index", result.index_bytes))
        if category == "gradients" and len(result.gradients_by_kind) > 1:
            lines += [_line(f"  {kind}", part) for kind, part in result.gradients_by_kind.items() if part]
        if category == "optimizer":
            lines += [_line(f"  {key}", part) for key, part in result.optimizer_by_key.items()]
    lines += [_line("total", result.total_bytes), "", f"{UNITS}."]
    return "\n".join(lines)


def simulated(job: Job, peak: Peak) -> str:
    """A peak by category, and by layer what is neither weights nor optimizer state."""
    lines = [f"{job.model}, {job.method}, {job.setting}", "", _HEAD]
    lines += [_line(category, size) for category, size in peak.by_category.items()]
    lines += [
        _line("peak", peak.peak_bytes),
        "",
        f"The peak is in the {peak.phase} of {peak.layer} ({peak.update}).",
        "Largest apart from weights and optimizer state, by the layer at work when they were made:",
        *(_line(f"  {layer}", size) for layer, size in islice(peak.by_layer.items(), 8)),
        "",
        f"{UNITS}.",
    ]
    return "\n".join(lines)


def measured(job: Job, expected: Estimate, peak: Peak, runs: Sequence[Measured]) -> str:
    """The three answers side by side, and what a resumed run did."""
    first = runs[0]
    lines = [
        f"{job.model}, {job.method}, {job.setting}, on {first.device}",
        "",
        f"{'GB':14}{'estimate':>12}{'simulate':>12}{'measure':>12}",
    ]
    for category, size in first.by_category.items():
        lines.append(_cells(category, (expected.by_category[category], peak.by_category[category], size)))
    lines += [
        _cells("total, peak", (expected.total_bytes, peak.peak_bytes, first.peak_bytes)),
        "",
        f"simulate / measure {peak.peak_bytes / first.peak_bytes:.3f}. Of a measured peak, the tensors of model and",
        'optimizer are known; the rest is under "other". On a CPU it is resident memory without that of the libraries.',
        f"Losses {', '.join(f'{loss:.6f}' for loss in first.losses)}; "
        f"seconds {', '.join(f'{seconds:.1f}' for seconds in first.seconds)}.",
    ]
    for resumed in runs[1:]:
        same = (resumed.losses[-1], resumed.weight_sum) == (first.losses[-1], first.weight_sum)
        lines.append(
            f"Resumed: loss {resumed.losses[-1]:.6f}, peak {resumed.peak_bytes / 1e9:.3f} GB; loss and sum of all "
            f"weights after this update are {'' if same else 'NOT '}the same, to the last bit, as without a break."
        )
    return "\n".join([*lines, "", f"{UNITS}."])


def planned(gpu_bytes: int, found: Found) -> str:
    """The plan with its command line, the best of the other optimizers, and what would fit next."""
    several = any(plan.devices.number > 1 for plan in found.best_of)
    heads = (
        *("weights", "method", "rank", "states", "updates", "micro-batches", "checkpointing", "cost", "GB", "GPU GB"),
        *(("devices", "sent GB") if several else ()),
    )
    least = min((plan.cost for plan in found.best_of), default=1.0)
    rows = [_planned(plan, least, several) for plan in found.best_of]
    lines = [
        f"{gpu_bytes / 1e9:.1f} GB, of which {available(gpu_bytes) / 1e9:.1f} GB are for tensors: CUDA's context takes "
        f"{CONTEXT / 1e9:.1f} GB, {FRAGMENTATION:.0%} are left to fragmentation.",
        COST_MODEL,
        "",
    ]
    if found.best is None:
        lines.append("No plan fits.")
    else:
        plan = found.best
        peak = f"predicted peak {plan.predicted_bytes / 1e9:.3f} GB, --simulate checks it"
        if plan.peak is not None:
            peak = f"simulated peak {plan.peak.peak_bytes / 1e9:.3f} GB ({plan.peak.peak_bytes / 2**30:.3f} GiB)"
        lines += ["Fastest of each optimizer that is predicted to fit:", "", table([heads, *rows]), ""]
        lines += [command_line(plan.job, plan.devices) for plan in found.best_of]
        lines += ["", f"Best: {plan.job.method}, {plan.job.setting}: {peak}", command_line(plan.job, plan.devices)]
    if found.next is not None:
        plan = found.next
        lines += [
            "",
            f"What would fit next: {plan.job.method}, {plan.job.setting}, on a card of "
            f"{needed(plan.predicted_bytes) / 1e9:.1f} GB:",
            command_line(plan.job, plan.devices),
        ]
    return "\n".join([*lines, "", f"{UNITS}."])


def _planned(plan: Plan, least: float, several: bool) -> tuple[object, ...]:
    job, args = plan.job, parse_optimizer_args(plan.job.optimizer_args)
    own = "int8" if job.optimizer.endswith("8bit") else "bf16" if job.optimizer == "AdamW" else "float32"
    return (
        job.weights or job.dtype,
        job.optimizer,
        str(args.get("rank", "-")),
        str(args.get("state_dtype", own)),
        "per layer" if job.per_layer else "at the end",
        f"{job.accumulate} x {job.batch_size}",
        "yes" if job.checkpointing else "no",
        f"{plan.cost / least:.3f}",
        f"{plan.predicted_bytes / 1e9:.2f}",
        f"{needed(plan.predicted_bytes) / 1e9:.2f}",
        *((f"{plan.devices.number} {plan.devices.strategy}", f"{plan.sent_bytes / 1e9:.2f}") if several else ()),
    )


def _call(name: str, args: Mapping[str, object]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})"


def _line(name: str, size: int) -> str:
    return f"{name:24}{size:>20,}{size / 1e9:>10.3f}{size / 2**30:>10.3f}"


def _cells(name: str, sizes: Iterable[int]) -> str:
    return f"{name:14}" + "".join(f"{size / 1e9:>12.3f}" for size in sizes)
