"""Calls of the kernels beyond those of ``benchmarks.kernel_cases``: roundings, layouts, scalars on the device, NaNs.

All are made from cases of that module, so that what the arguments of an operation are called stands there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_cases import MAKERS, MOST_USED, SIZES, TINY, Case, Size
from lowrank_optim.ops import pick
from lowrank_optim.ops.blockwise import quantize_
from lowrank_optim.ops.rounding import join_24_bits, split_24_bits

Maker = Callable[[Size, torch.device], Case]
Change = Callable[[Case], Case]

MAKER: dict[str, Maker] = {maker.__name__.strip("_"): maker for maker in MAKERS}
UPDATES = ("lowrank_update", "rescaled_update", "rescaled_columns", "two_sided_update")
# What the hardware of NVIDIA's GPUs makes of 0 * inf; a CPU's NaN has another bit pattern.
HARDWARE_NAN = 0x7FFFFFFF
# Of the preset's weights as they lie in memory: a down_proj is (hidden, intermediate), its rows are of odd length.
ODD = {
    "llama_71m, as it lies": Size(rows=512, columns=1368, rank=128, tokens=256),
    "llama_100m, as it lies": Size(rows=640, columns=1708, rank=160, tokens=256),
    "llama_1b, as it lies": Size(rows=2048, columns=5461, rank=512, tokens=256),
}
EXPERTS = Size(rows=1408, columns=512, rank=128, tokens=256)
# For the interpreter, of odd sizes, more than a tile of most kernels.
TALL, WIDE = Size(rows=67, columns=37, rank=17, tokens=9), Size(rows=33, columns=69, rank=17, tokens=9)
BATCH = 3


class Check(NamedTuple):
    """One case of a kernel, and how it is judged: figures, ``right`` among them."""

    name: str
    make: Callable[[], Case]
    judge: Callable[[Case], dict[str, Any]]

    @property
    def most_used(self) -> bool:
        return MAKER[self.name.partition(",")[0]] in MOST_USED


def checks(device: torch.device) -> list[Check]:
    """All of them, those of the most used kernels first; on the CPU the smallest shapes alone."""
    _never_elsewhere()
    cuda = device.type == "cuda"
    sizes = SIZES if cuda else {"tall": TALL}
    odd = ODD if cuda else {"wide, as it lies": WIDE}
    plain: list[tuple[str, Maker, Size, Change]] = [
        (f"{name}, {at}", maker, size, _same) for name, maker in MAKER.items() for at, size in sizes.items()
    ]
    plain += [
        (f"{name}, {at}", MAKER[name], size, _same)
        for at, size in odd.items()
        for name in (*UPDATES, "lowrank_update_int8", "lowrank_update_int4")
    ]
    plain += [
        (f"{name}, {label}, {at}", MAKER[name], size, change)
        for name, label, change in CHANGED
        for at, size in {**sizes, **(odd if label == "transposed" else {})}.items()
    ]
    size = EXPERTS if cuda else WIDE
    found = [Check(label, partial(_made, maker, at, device, change), judge) for label, maker, at, change in plain]
    found += [Check(f"{n}, {BATCH} experts", partial(experts, MAKER[n], size, device), judge) for n in BATCHED]
    found += [
        Check(f"{name}, {label}, one NaN", partial(_made, MAKER[name], size, device, change), judge_nan)
        for name, label, change in CHANGED
        # A step counts a value that is not finite as zero.
        if label in ("stochastic", "compensated", "bf16 moments") and name != "adam_update"
    ]
    return sorted(found, key=lambda check: not check.most_used)


def smallest(device: torch.device) -> list[Check]:
    """Every kernel and change once, at the smallest shapes."""
    _never_elsewhere()
    size = TINY if device.type == "cuda" else TALL
    found = [Check(name, partial(maker, size, device), judge) for name, maker in MAKER.items()]
    return found + [
        Check(f"{name}, {label}", partial(_made, MAKER[name], size, device, change), judge)
        for name, label, change in CHANGED
    ]


def _never_elsewhere() -> None:
    """Keep the kernel of a gram matrix from leaving small ones to torch."""
    importlib.import_module("lowrank_kernels.gram").SYMMETRIC_FROM = 1  # type: ignore[attr-defined]


def _made(maker: Maker, size: Size, device: torch.device, change: Change) -> Case:
    return change(maker(size, device))


def _same(case: Case) -> Case:
    return case


def transposed(case: Case) -> Case:
    """Large operands with the strides of a transposed matrix."""
    large = ("weight", "grad", "codes", "x", "scored")
    tensors = {k: t.mT.contiguous().mT if k in large and t.ndim == 2 else t for k, t in case.tensors.items()}
    return case._replace(tensors=tensors)


def in_fp32(case: Case) -> Case:
    """bf16 operands widened: without tensor cores."""
    tensors = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in case.tensors.items()}
    return case._replace(tensors=tensors)


def stochastic(case: Case) -> Case:
    return case._replace(options={**case.options, "key": 5})


def compensated(case: Case) -> Case:
    # Not any two: a correction below a zero would be no number.
    weight, correction = split_24_bits(torch.randn_like(case.tensors["weight"], dtype=torch.float32), 7)
    tensors = {**case.tensors, "weight": weight, "correction": correction}
    return stochastic(case._replace(tensors=tensors, mutated=(*case.mutated, "correction")))


def decayed(case: Case) -> Case:
    return case._replace(options={**case.options, "decay": 0.9})


def on_device(case: Case) -> Case:
    """Numbers as one-element tensors, as a CUDA graph wants them."""
    device = next(iter(case.tensors.values())).device
    options = dict(case.options)
    for key in ("alpha", "decay", "eps"):
        if key in options:
            options[key] = torch.tensor(options[key], device=device)
    for key in ("key", "step"):
        if key in options:
            options[key] = torch.tensor(options[key], dtype=torch.int32, device=device)
    return case._replace(options=options)


def with_moments(case: Case) -> Case:
    """Moments of a run under way, over several decades, in the place of zeros."""
    tensors = dict(case.tensors)
    like = tensors["grad"].float()
    exp_avg, exp_avg_sq = torch.randn_like(like) * 0.1, torch.randn_like(like).pow(4)
    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if name in tensors:
            tensors[name] = value.to(tensors[name].dtype)
        else:
            quantize_(tensors[f"{name}_codes"], tensors[f"{name}_scale"], value, signed=name == "exp_avg")
    return case._replace(tensors=tensors)


def bf16_moments(case: Case) -> Case:
    case = with_moments(case)
    moments = {name: case.tensors[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    return case._replace(tensors={**case.tensors, **moments}, options={**case.options, "keys": (5, 6)})


def with_norms(case: Case) -> Case:
    case = with_moments(case)
    grad = case.tensors["grad"]
    norms = torch.full((2, len(grad)), torch.nan, device=grad.device)
    return case._replace(tensors={**case.tensors, "norms": norms}, mutated=(*case.mutated, "norms"))


def without_product(case: Case) -> Case:
    tensors = {name: tensor for name, tensor in case.tensors.items() if name not in ("left", "right")}
    moved = case.moved - sum(case.tensors[name].nbytes for name in ("left", "right"))
    return case._replace(tensors=tensors, options={**case.options, "left": None, "right": None}, moved=moved, flops=0)


def one_scale(case: Case) -> Case:
    """The same number for all rows."""
    return without_product(case._replace(tensors={**case.tensors, "row_scale": case.tensors["row_scale"][:1]}))


DIRECTIONS = ("adam_direction", "adam8bit_direction")
# Operation, how the case is called, and what makes it of the plain one.
CHANGED: list[tuple[str, str, Change]] = [
    # A low-rank gradient is in fp32, one of a parameter that is not compressed is as it comes.
    *((name, "fp32, norms", lambda case: with_norms(in_fp32(case))) for name in DIRECTIONS),
    *((name, "fp32", in_fp32) for name in (*DIRECTIONS, *UPDATES)),
    *((name, "stochastic", stochastic) for name in UPDATES),
    *((name, "compensated", compensated) for name in UPDATES),
    *((name, "transposed", transposed) for name in (*UPDATES, "dct_select", "sketch")),
    *((name, "no product", lambda case: without_product(stochastic(case))) for name in UPDATES[1:]),
    ("rescaled_update", "one scale, no product", lambda case: one_scale(stochastic(case))),
    ("rescaled_update", "stochastic, transposed", lambda case: transposed(stochastic(case))),
    ("rescaled_update", "compensated, scalars on the device", lambda case: on_device(decayed(compensated(case)))),
    ("lowrank_update", "scalars on the device", lambda case: on_device(decayed(case))),
    ("lowrank_update_int8", "scalars on the device", lambda case: on_device(decayed(case))),
    ("lowrank_update_int4", "scalars on the device", lambda case: on_device(decayed(case))),
    ("gaussian", "key on the device", lambda case: case._replace(options={**case.options, "key": _key(case)})),
    ("adam_direction", "random moments", with_moments),
    ("adam_direction", "bf16 moments", bf16_moments),
    ("adam_direction", "norms", with_norms),
    ("adam_direction", "eps on the device", lambda case: on_device(with_moments(case))),
    ("adam_update", "random moments", with_moments),
    ("adam_update", "stochastic", stochastic),
    ("adam_update", "compensated", compensated),
    ("adam_update", "bf16 moments", bf16_moments),
    ("adam_update", "fp32", lambda case: in_fp32(with_moments(case))),
    ("adam_update", "scalars on the device", lambda case: on_device(compensated(case))),
    ("adam8bit_direction", "random moments", with_moments),
    ("adam8bit_direction", "norms", with_norms),
]
BATCHED = (*UPDATES, "dct_select", "move_columns", "gram", "adam_direction", "sketch")


def _key(case: Case) -> Tensor:
    return torch.tensor(case.options["key"], dtype=torch.int32, device=case.options["device"])


def experts(maker: Maker, size: Size, device: torch.device) -> Case:
    """A batch of matrices, each with numbers of its own."""
    made = [maker(size, device) for _ in range(BATCH)]
    tensors = {name: torch.stack([one.tensors[name] for one in made]) for name in made[0].tensors}
    return made[0]._replace(tensors=tensors, moved=BATCH * made[0].moved, flops=BATCH * made[0].flops)


def judge(case: Case) -> dict[str, Any]:
    """The largest error of a result, and of eager's, in norms relative to fp64; right: at most twice eager's.

    An absolute part of 1e-6 of a result makes room for those that eager rounds by luck to nothing. Codes may differ
    from eager's in one place of a thousand, where a value lies between two.
    """
    found = (_results(case, "triton"), _results(case, "eager"), _results(_unrounded(case), "eager", exact=True))
    worst: dict[str, Any] = {"error": 0.0, "eager_error": 0.0, "ratio": 0.0}
    for ours, theirs, exact in zip(*found, strict=True):
        if not exact.is_floating_point():
            different = float((ours != theirs).double().mean())
            ratio, error, allowed = 1e3 * different, different, 0.0
        else:
            error, allowed = (float((result.double() - exact).norm() / exact.norm()) for result in (ours, theirs))
            ratio = error / (2 * allowed + 1e-6)
        # Not ratio > worst: a NaN is the worst of all.
        if not ratio <= worst["ratio"]:
            worst = {"error": error, "eager_error": allowed, "ratio": ratio}
    return {**worst, "right": worst["ratio"] <= 1}


def _results(case: Case, backend: str, *, exact: bool = False) -> list[Tensor]:
    """What the case returns and writes; a weight and its correction as the one value that they are."""
    if "correction" not in case.tensors:
        return case.results(backend, exact=exact)
    *rest, weight, correction = case.results(backend)
    return [*rest, join_24_bits(weight, correction)]


def _unrounded(case: Case) -> Case:
    """The case whose results are not rounded: without keys, and with the correction within the weight."""
    tensors = dict(case.tensors)
    floating = all(tensors[name].is_floating_point() or name == "correction" for name in case.mutated)
    if not floating or not case.mutated:
        return case
    if "correction" in tensors:
        tensors["weight"] = join_24_bits(tensors["weight"].contiguous(), tensors.pop("correction"))
    options = {key: value for key, value in case.options.items() if key not in ("key", "keys")}
    mutated = tuple(name for name in case.mutated if name != "correction")
    return case._replace(tensors=tensors, options=options, mutated=mutated)


def judge_nan(case: Case) -> dict[str, Any]:
    """Whether a NaN of the hardware's bit pattern stays one, where the result is rounded to fewer bits.

    In the place of one element of an operand that reaches one row, or one element, of each result.
    """
    operand = "grad" if "grad" in case.tensors else "left"
    tensors: Mapping[str, Tensor] = {name: tensor.clone() for name, tensor in case.tensors.items()}
    wide = tensors[operand].float()
    wide.view(torch.int32)[3, 5] = HARDWARE_NAN
    tensors = {**tensors, operand: wide}
    reached = (3,) if operand == "left" else (3, 5)
    operation = pick(case.operation, "triton", wide.device)
    operation(**tensors, **case.options)
    results = {name: tensors[name] for name in case.mutated if name != "correction"}
    missing = {name: int((~result[reached].isnan()).sum()) for name, result in results.items()}
    spread = {name: int(result.isnan().sum() - result[reached].isnan().sum()) for name, result in results.items()}
    right = not any(missing.values()) and not any(spread.values())
    return {"lost": missing, "elsewhere": spread, "right": right}
