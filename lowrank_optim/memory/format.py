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
    Plan,
    available,
    command_line,
)
from lowrank_optim.memory.tracker import Peak

UNITS = "GB = 10^9 bytes, GiB = 2^30 bytes"
_HEAD = f"{'':24}{'bytes':>20}{'GB':>10}{'GiB':>10}"


def estimated(result: Estimate) -> str:
    """An estimate by category and by state key."""
    share = 100 * result.low_rank_parameters / result.parameters
    layers = f" as {_call(result.parameterization, result.parameterization_args)}" if result.parameterization else ""
    lines = [
        f"{result.model}{layers}, {_call(result.optimizer, result.optimizer_args)}, {result.dtype}",
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


def planned(gpu_bytes: int, plan: Plan | None, others: Sequence[Plan]) -> str:
    """The plan with its command line, and the best of the other optimizers."""
    lines = [
        f"{gpu_bytes / 1e9:.1f} GB, of which {available(gpu_bytes) / 1e9:.1f} GB are for tensors: CUDA's context takes "
        f"{CONTEXT / 1e9:.1f} GB, {FRAGMENTATION:.0%} are left to fragmentation.",
        COST_MODEL,
        "",
        f"{'fastest of each optimizer, predicted to fit':64}{'setting':58}{'cost':>8}{'GB':>8}",
    ]
    least = min((other.cost for other in others), default=1.0)
    for other in others:
        lines.append(
            f"{other.job.method:64}{other.job.setting:58}{other.cost / least:8.3f}{other.predicted_bytes / 1e9:8.2f}"
        )
    if plan is None or plan.peak is None:
        return "\n".join([*lines, "", "No plan fits."])
    return "\n".join(
        [
            *lines,
            "",
            f"{plan.job.method}, {plan.job.setting}: simulated peak {plan.peak.peak_bytes / 1e9:.3f} GB "
            f"({plan.peak.peak_bytes / 2**30:.3f} GiB)",
            command_line(plan.job),
            "",
            f"{UNITS}.",
        ]
    )


def _call(name: str, args: Mapping[str, object]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})"


def _line(name: str, size: int) -> str:
    return f"{name:24}{size:>20,}{size / 1e9:>10.3f}{size / 2**30:>10.3f}"


def _cells(name: str, sizes: Iterable[int]) -> str:
    return f"{name:14}" + "".join(f"{size / 1e9:>12.3f}" for size in sizes)
