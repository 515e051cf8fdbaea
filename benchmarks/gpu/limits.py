"""What the device allows: the figures that all others are held to."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting
from benchmarks.kernel_steps import Limit

# Launches in a row whose host time is measured; fewer than the driver's queue holds.
LAUNCHES = 500
COPY, PRODUCT = "copy {} MiB", "product {}"
LARGE_COPY, BF16_PRODUCT = COPY.format(1024), PRODUCT.format("bf16")


def tasks(setting: Setting) -> list[Task]:
    sizes = (32, 1024, 4096) if setting.cuda else (1,)
    products = (("bf16", torch.bfloat16, False), ("fp32", torch.float32, False), ("tf32", torch.float32, True))
    found = [
        Task("versions", partial(versions, setting)),
        *(Task(COPY.format(mib), partial(copy, setting, mib)) for mib in sizes),
        *(Task(PRODUCT.format(name), partial(product, setting, dtype, tf32)) for name, dtype, tf32 in products),
        Task("launch of an ATen operation", partial(host_time, setting, aten_launch(setting))),
        Task("launch of a Triton kernel", lambda: host_time(setting, triton_launch(setting))),
    ]
    if setting.cuda:
        found.append(Task("launch of torch's fused AdamW", lambda: host_time(setting, adamw_launch(setting))))
    return found


def versions(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {"versions": {**common.versions(), "python": platform.python_version()}}
    for name in ("accelerate", "pytest"):
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["machine"] = common.machine(setting.device)
    if setting.cuda:
        about = torch.cuda.get_device_properties(setting.device)
        found["cuda"] = torch.version.cuda
        found["multiprocessors"] = about.multi_processor_count
        found["memory_bytes"], found["l2_bytes"] = about.total_memory, about.L2_cache_size
    return found


def copy(setting: Setting, mib: int) -> dict[str, float]:
    source = torch.randint(256, (mib << 20,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    ms = setting.ms(lambda: target.copy_(source))
    return {"ms": ms, "tb_s": 2 * source.nbytes / ms / 1e9}


def product(setting: Setting, dtype: torch.dtype, tf32: bool) -> dict[str, float]:
    side = 8192 if setting.cuda else 64
    # Random values: a product of zeros runs faster than real data does.
    a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ms = setting.ms(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"side": side, "ms": ms, "tflop_s": 2 * side**3 / ms / 1e9}


def host_time(setting: Setting, launch: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of the host for a call that returns before the device has done it."""
    times = LAUNCHES if setting.cuda else 3
    for _ in range(min(times, 50)):
        launch()
    setting.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        launch()
    taken = time.perf_counter() - start
    return {"host_us": 1e6 * taken / times}


def aten_launch(setting: Setting) -> Callable[[], Any]:
    tiny = torch.zeros(16, device=setting.device)
    return lambda: tiny.add_(1)


def triton_launch(setting: Setting) -> Callable[[], Any]:
    from benchmarks.gpu.cases import MAKER
    from benchmarks.kernel_cases import Size

    case = MAKER["adam_direction"](Size(rows=16, columns=16, rank=16, tokens=16), setting.device)
    return case.bound("triton")


def adamw_launch(setting: Setting) -> Callable[[], Any]:
    """All seven matrices of a layer are one launch or two."""
    params = [torch.nn.Parameter(torch.zeros(16, 16, device=setting.device)) for _ in range(7)]
    for p in params:
        p.grad = torch.ones_like(p)
    return torch.optim.AdamW(params, fused=True).step


def limit_of(rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> Limit | None:
    """Bandwidth and rate from what has been recorded of this piece, None where it is not there."""
    by_name = {row["name"]: row for row in rows}
    copied = by_name.get(LARGE_COPY) or by_name.get(COPY.format(1), {})
    rate, bandwidth = by_name.get(BF16_PRODUCT, {}).get("tflop_s"), copied.get("tb_s")
    return Limit(1e12 * bandwidth, 1e12 * rate) if bandwidth and rate else None
