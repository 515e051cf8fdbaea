"""Kernels compile for real GPUs on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from lowrank_kernels.adam_direction import BLOCK, adam_direction_kernel

signature = {name: "*fp32" for name in ("grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "direction_ptr")}
signature |= {"n": "i32", "BLOCK": "constexpr"}
signature |= {name: "fp32" for name in ("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps")}
# By position: triton 3.2 calls the third argument constants, later ones constexprs.
source = triton.compiler.ASTSource(adam_direction_kernel, signature, {"BLOCK": BLOCK})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert compiled.asm["cubin"][:4] == b"\\x7fELF", "no cubin"
print("sm_90", len(compiled.asm["cubin"]))
"""


COMPILE_GAUSSIAN = """
import triton
from triton.backends.compiler import GPUTarget
from lowrank_kernels.gaussian import BLOCK, gaussian_kernel

for key in ("i32", "*i32"):
    signature = {"out_ptr": "*bf16", "key": key, "size": "i32", "half": "i32"}
    signature |= {"KEY_ON_DEVICE": "constexpr", "BLOCK": "constexpr"}
    constants = {"KEY_ON_DEVICE": key == "*i32", "BLOCK": BLOCK}
    source = triton.compiler.ASTSource(gaussian_kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"][:4] == b"\\x7fELF", "no cubin"
print("sm_90", len(compiled.asm["cubin"]))
"""


@pytest.mark.parametrize("code", [COMPILE, COMPILE_GAUSSIAN], ids=["adam_direction", "gaussian"])
def test_kernels_compile_for_sm_90(code: str) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sm_90")
