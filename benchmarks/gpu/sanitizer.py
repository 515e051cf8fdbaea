"""Every kernel at its smallest shapes under ``compute-sanitizer``, which sees each access outside of an allocation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import smallest
from benchmarks.gpu.record import Task
from benchmarks.gpu.setting import Setting, start_device

TOOL = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin",)
MARK = "---- "
# Left for reading what was said.
RESERVE = 3.0


def tasks(setting: Setting) -> list[Task]:
    """One process for all kernels, as torch is slow to start under the tool."""
    return [Task("memcheck", partial(run, setting))]


def run(setting: Setting) -> dict[str, Any]:
    """Errors by kernel; on the CPU without the tool, which shows that each can be launched."""
    command = [sys.executable, "-m", __name__]
    if setting.cuda:
        tool = shutil.which(TOOL, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
        if tool is None:
            return {"reason": f"{TOOL} is not installed"}
        command = [tool, "--tool", "memcheck", *command]
    # Each tensor an allocation of its own: in a block of torch's cache, an access past its end would stay inside.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = setting.scratch / "sanitizer.log"
    with log.open("w", encoding="utf-8") as file, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=setting.left() - RESERVE,
            check=False,
        )
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-20000:])
    return {"tool": TOOL if setting.cuda else None, **read(text, [check.name for check in smallest(setting.device)])}


def read(text: str, names: list[str]) -> dict[str, Any]:
    """What was said of each kernel, between its mark and the next."""
    said = dict(part.split("\n", 1) for part in text.split(MARK)[1:] if "\n" in part)
    errors = {name: len(re.findall(r"Invalid \S+ (?:read|write)|Misaligned", said[name])) for name in said}
    failed = {name: found[1] for name in said if (found := re.search(r"^failed: (.*)$", said[name], re.MULTILINE))}
    missing = [name for name in names if name not in said]
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    return {
        "kernels": len(names) - len(missing),
        "errors": {name: count for name, count in errors.items() if count},
        "failed": failed,
        "not_reached": missing,
        "summary": summary and int(summary[1]),
        "right": not any(errors.values()) and not failed and not missing and not (summary and int(summary[1])),
    }


def main() -> None:
    """The process that is watched."""
    device, _ = start_device()
    for check in smallest(device):
        print(f"{MARK}{check.name}", flush=True)
        try:
            check.make().bound("triton")()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            print(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    print(f"{MARK}end", flush=True)


if __name__ == "__main__":
    main()
