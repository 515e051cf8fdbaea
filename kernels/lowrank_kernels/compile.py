"""Compile every kernel for GPUs that need not be there: ``python -m lowrank_kernels.compile``.

A kernel module has ``aot_cases()``, a list of (label, kernel, signature, constants, options): argument types by name
("*fp32", "i32", "constexpr"), values of the constexprs, and options of the launch such as ``num_warps``. Each case is
compiled twice, with every pointer and integer divisible by 16 ("aligned", as LLaMA's matrices mostly are) and with none
of which anything is known, as the launcher would for such arguments. The exit status is 1 where a kernel spills
registers or takes more shared memory than a block can have.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lowrank_kernels

# Compute capability -> bytes of shared memory a block can have (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The oldest triton that compiles products for it.
SINCE = {100: (3, 3)}
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


class Case(NamedTuple):
    """One specialization of one kernel."""

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


class Usage(NamedTuple):
    """What a kernel takes on an architecture: registers and bytes of local memory a thread, of shared a block."""

    kernel: str
    arch: int
    aligned: bool
    registers: int
    local: int
    shared: int

    def complaint(self) -> str | None:
        """Why this must not ship, None where nothing is wrong."""
        name = f"{self.kernel} ({operands(self.aligned)}) on sm_{self.arch}"
        if self.local:
            return f"{name}: {self.local} bytes of local memory a thread, expected none"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{name}: {self.shared} bytes of shared memory, expected at most {SHARED_LIMIT[self.arch]}"
        return None


def operands(aligned: bool) -> str:
    """The word for what is known of pointers and sizes."""
    return "aligned" if aligned else "unaligned"


def cases() -> Iterator[Case]:
    """The cases of all modules of the package but this one and private ones, which hold parts of kernels.

    Raises:
        TypeError: a module without ``aot_cases``.
    """
    for info in pkgutil.iter_modules(lowrank_kernels.__path__):
        if info.name == "compile" or info.name.startswith("_"):
            continue
        try:
            module = importlib.import_module(f"lowrank_kernels.{info.name}")
        except ImportError as error:
            # An operation without its kernel is eager; see lowrank_optim.ops.pick.
            print(f"left out: {error}", file=sys.stderr)
            continue
        if not hasattr(module, "aot_cases"):
            raise TypeError(f"Invalid kernel module: {module.__name__} has no aot_cases()")
        yield from (Case(*case) for case in module.aot_cases())


def compiled(case: Case, arch: int, *, aligned: bool) -> tuple[bytes, int]:
    """The cubin of a case and the bytes of dynamic shared memory that its launch asks for."""
    import triton
    from triton.backends import compiler

    divisible = [i for i, name in enumerate(case.kernel.arg_names) if case.signature[name][:1] in ("*", "i")]
    attributes: Any = {(i,): DIVISIBLE_BY_16 for i in divisible} if aligned else None
    if aligned and hasattr(compiler, "AttrsDescriptor"):  # triton 3.2
        properties = {"arg_properties": {"tt.divisibility": divisible}, "cls": "AttrsDescriptor"}
        attributes = compiler.AttrsDescriptor.from_dict(properties)
    # By position: triton 3.2 calls the third argument constants, later ones constexprs.
    source = triton.compiler.ASTSource(case.kernel, dict(case.signature), dict(case.constants), attributes)
    target = compiler.GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options=dict(case.options))
    return binary.asm["cubin"], binary.metadata.shared


def usage(case: Case, arch: int, *, aligned: bool) -> Usage:
    """Compile a case for an architecture and read what it takes from the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin, dynamic = compiled(case, arch, aligned=aligned)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return Usage(case.label, arch, aligned, of["REG"], of["STACK"] + of["LOCAL"], of["SHARED"] + dynamic)


def markdown(rows: Sequence[Usage]) -> str:
    """A table with two lines a kernel and a column an architecture: registers / local bytes / shared KiB."""
    archs = sorted({row.arch for row in rows})
    at = {
        (row.kernel, row.aligned, row.arch): f"{row.registers} / {row.local} / {row.shared / 1024:.3g}" for row in rows
    }
    lines = [
        f"| kernel | operands | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        f"|---|---{'|---:' * len(archs)}|",
    ]
    for kernel, aligned in dict.fromkeys((row.kernel, row.aligned) for row in rows):
        cells = " | ".join(at[kernel, aligned, arch] for arch in archs)
        lines.append(f"| {kernel} | {operands(aligned)} | {cells} |")
    return "\n".join(
        [*lines, "", "Registers a thread / bytes of local memory a thread / KiB of shared memory a block."]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lowrank_kernels.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, help="default: all that triton knows")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="kernels whose labels begin with these")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, beside those of other tritons")
    options = parser.parse_args(argv)
    # A kernel that is decorated for the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton
    except ImportError as error:
        raise SystemExit(f"lowrank_kernels.compile: error: needs triton: {error}") from error
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    archs = options.arch or [arch for arch in SHARED_LIMIT if version >= SINCE.get(arch, version)]
    chosen = [case for case in cases() if case.label.startswith(tuple(options.only))]
    rows = [usage(case, arch, aligned=aligned) for case in chosen for aligned in (True, False) for arch in archs]
    print(markdown(rows))
    if options.json:
        found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {"kernels": {}}
        before = [
            row for row in found["kernels"].get(triton.__version__, [])
            if not row["kernel"].startswith(tuple(options.only))
        ]  # fmt: skip
        if options.only == [""]:
            found["command"] = f"python -m lowrank_kernels.compile {' '.join(sys.argv[1:])}"
        found["kernels"][triton.__version__] = before + [row._asdict() for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    complaints = [complaint for row in rows if (complaint := row.complaint())]
    if complaints:
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    main()
